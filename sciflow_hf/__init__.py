"""Fine-tune and train image diffusion models for scientific figures, the Hugging Face way."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module. Imported at first use, so that `import sciflow_hf` and `--help` load no torch models.
_PUBLIC = {
    "AdapterArguments": "adapters.arguments",
    "BucketBatchSampler": "data.batches.buckets",
    "CacheError": "errors",
    "ClassImageArguments": "images.class_source",
    "DataArguments": "data.arguments",
    "DiffusionTrainer": "training.trainer",
    "DiffusionTrainingArguments": "training.arguments",
    "DiT": "families.dit",
    "EMACallback": "training.callbacks.ema",
    "Flux": "families.flux",
    "Flux2Klein": "families.flux2_klein",
    "ForwardModel": "images.optics",
    "MicroscopyDataArguments": "images.microscopes",
    "MicroscopyUNet": "families.microscopy_unet",
    "ModelFamily": "families.base",
    "PipelineFamily": "families.base",
    "ProgressiveResolution": "training.callbacks.progressive",
    "QwenImage": "families.qwen_image",
    "RestorationMetrics": "metrics.restoration",
    "SD3": "families.sd3",
    "SDXL": "families.sdxl",
    "SampleMetrics": "metrics.samples",
    "SciflowError": "errors",
    "add_adapter": "adapters.adapter",
    "build_cache": "data.build.build",
    "build_cache_for": "training.prepare",
    "convert_cache": "data.build.convert",
    "debug_batch": "report.plan",
    "describe_cache": "data.inspect.describe",
    "draw_bucket_chart": "data.inspect.chart",
    "finish": "training.finish",
    "load_cache": "data.load",
    "load_data": "data.load",
    "load_family": "families",
    "parse_args": "options",
    "plan": "report.plan",
    "plot_training": "report.plots",
    "prepare_class_images": "training.prepare",
    "prepare_data": "training.prepare",
    "prepare_microscopy": "training.prepare",
    "run": "cli.run",
    "summary": "report.summary",
    "verify_cache": "data.inspect.verify",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from .adapters.adapter import add_adapter
    from .adapters.arguments import AdapterArguments
    from .cli.run import run
    from .data.arguments import DataArguments
    from .data.batches.buckets import BucketBatchSampler
    from .data.build.build import build_cache
    from .data.build.convert import convert_cache
    from .data.inspect.chart import draw_bucket_chart
    from .data.inspect.describe import describe_cache
    from .data.inspect.verify import verify_cache
    from .data.load import load_cache, load_data
    from .errors import CacheError, SciflowError
    from .families import load_family
    from .families.base import ModelFamily, PipelineFamily
    from .families.dit import DiT
    from .families.flux import Flux
    from .families.flux2_klein import Flux2Klein
    from .families.microscopy_unet import MicroscopyUNet
    from .families.qwen_image import QwenImage
    from .families.sd3 import SD3
    from .families.sdxl import SDXL
    from .images.class_source import ClassImageArguments
    from .images.microscopes import MicroscopyDataArguments
    from .images.optics import ForwardModel
    from .metrics.restoration import RestorationMetrics
    from .metrics.samples import SampleMetrics
    from .options import parse_args
    from .report.plan import debug_batch, plan
    from .report.plots import plot_training
    from .report.summary import summary
    from .training.arguments import DiffusionTrainingArguments
    from .training.callbacks.ema import EMACallback
    from .training.callbacks.progressive import ProgressiveResolution
    from .training.finish import finish
    from .training.prepare import build_cache_for, prepare_class_images, prepare_data, prepare_microscopy
    from .training.trainer import DiffusionTrainer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
