"""Fine-tune and train image diffusion models for scientific figures, the Hugging Face way."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module. Imported at first use, so that `import sciflow_hf` and `--help` load no torch models.
_PUBLIC = {
    "AdapterArguments": "adapters",
    "BucketBatchSampler": "data.buckets",
    "CacheError": "errors",
    "ClassImageArguments": "data.class_source",
    "DataArguments": "data.arguments",
    "DiffusionTrainer": "trainer",
    "DiffusionTrainingArguments": "training_args",
    "DiT": "families.dit",
    "EMACallback": "callbacks.ema",
    "Flux": "families.flux",
    "Flux2Klein": "families.flux2_klein",
    "ForwardModel": "microscopy.optics",
    "MicroscopyDataArguments": "data.microscopy_images",
    "MicroscopyUNet": "families.microscopy_unet",
    "ModelFamily": "families.base",
    "PipelineFamily": "families.base",
    "ProgressiveResolution": "callbacks.progressive",
    "QwenImage": "families.qwen_image",
    "RestorationMetrics": "metrics.restoration",
    "SD3": "families.sd3",
    "SDXL": "families.sdxl",
    "SampleMetrics": "metrics.samples",
    "SciflowError": "errors",
    "add_adapter": "adapters",
    "build_cache": "data.build",
    "build_cache_for": "prepare",
    "convert_cache": "data.convert",
    "debug_batch": "reports",
    "describe_cache": "data.describe",
    "draw_bucket_chart": "data.chart",
    "load_cache": "data.cache",
    "load_data": "data.arguments",
    "load_family": "families",
    "parse_args": "config",
    "plan": "reports",
    "plot_training": "plots",
    "prepare_class_images": "prepare_classes",
    "prepare_data": "prepare",
    "prepare_microscopy": "prepare_microscopy",
    "run": "config",
    "summary": "run_facts",
    "verify_cache": "data.verify",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from .adapters import AdapterArguments, add_adapter
    from .callbacks.ema import EMACallback
    from .callbacks.progressive import ProgressiveResolution
    from .config import parse_args, run
    from .data.arguments import DataArguments, load_data
    from .data.buckets import BucketBatchSampler
    from .data.build import build_cache
    from .data.cache import load_cache
    from .data.chart import draw_bucket_chart
    from .data.class_source import ClassImageArguments
    from .data.convert import convert_cache
    from .data.describe import describe_cache
    from .data.microscopy_images import MicroscopyDataArguments
    from .data.verify import verify_cache
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
    from .metrics.restoration import RestorationMetrics
    from .metrics.samples import SampleMetrics
    from .microscopy.optics import ForwardModel
    from .plots import plot_training
    from .prepare import build_cache_for, prepare_data
    from .prepare_classes import prepare_class_images
    from .prepare_microscopy import prepare_microscopy
    from .reports import debug_batch, plan
    from .run_facts import summary
    from .trainer import DiffusionTrainer
    from .training_args import DiffusionTrainingArguments


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
