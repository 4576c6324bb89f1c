"""Fine-tune and train image diffusion models for scientific figures, the Hugging Face way."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module. Imported at first use, so that `import sciflow_hf` and `--help` load no torch models.
_PUBLIC = {
    "AdapterArguments": "adapters",
    "BucketBatchSampler": "data.buckets",
    "CacheError": "errors",
    "DataArguments": "data.arguments",
    "DiffusionTrainer": "trainer",
    "DiffusionTrainingArguments": "training_args",
    "EMACallback": "callbacks.ema",
    "Flux": "families.flux",
    "Flux2Klein": "families.flux2_klein",
    "ModelFamily": "families.base",
    "PipelineFamily": "families.base",
    "QwenImage": "families.qwen_image",
    "SD3": "families.sd3",
    "SDXL": "families.sdxl",
    "SciflowError": "errors",
    "add_adapter": "adapters",
    "build_cache": "data.build",
    "debug_batch": "reports",
    "load_cache": "data.cache",
    "load_data": "data.arguments",
    "load_family": "families",
    "parse_args": "config",
    "plan": "reports",
    "prepare_data": "prepare",
    "run": "config",
    "summary": "run_facts",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from .adapters import AdapterArguments, add_adapter
    from .callbacks.ema import EMACallback
    from .config import parse_args, run
    from .data.arguments import DataArguments, load_data
    from .data.buckets import BucketBatchSampler
    from .data.build import build_cache
    from .data.cache import load_cache
    from .errors import CacheError, SciflowError
    from .families import load_family
    from .families.base import ModelFamily, PipelineFamily
    from .families.flux import Flux
    from .families.flux2_klein import Flux2Klein
    from .families.qwen_image import QwenImage
    from .families.sd3 import SD3
    from .families.sdxl import SDXL
    from .prepare import prepare_data
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
