"""Fine-tune and train image diffusion models for scientific figures, the Hugging Face way."""

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .adapters.adapter import add_adapter
    from .adapters.arguments import AdapterArguments
    from .cli.run import run
    from .data.arguments import DataArguments
    from .data.batches.buckets import BucketBatchSampler
    from .data.build.build import build_cache
    from .data.build.convert import convert_cache
    from .data.build.references import SourceRules
    from .data.inspect.chart import draw_bucket_chart
    from .data.inspect.describe import describe_cache
    from .data.inspect.verify import verify_cache
    from .data.load import load_cache, load_data
    from .data.preference_groups import PreferenceGroups, load_groups
    from .data.preferences import TupleArguments
    from .errors import CacheError, SciflowError
    from .families import load_family
    from .families.base import ModelFamily, PipelineFamily
    from .families.dit import DiT
    from .families.ernie_image import ErnieImage
    from .families.flux import Flux
    from .families.flux2 import Flux2
    from .families.flux2_klein import Flux2Klein
    from .families.flux_kontext import FluxKontext
    from .families.microscopy_unet import MicroscopyUNet
    from .families.qwen_image import QwenImage
    from .families.qwen_image_edit import QwenImageEdit
    from .families.sd3 import SD3
    from .families.sdxl import SDXL
    from .families.z_image import ZImage
    from .images.class_source import ClassImageArguments
    from .images.microscopes import MicroscopyDataArguments
    from .images.optics import ForwardModel
    from .metrics.restoration import RestorationMetrics
    from .metrics.rewards.base import load_reward, load_rewards, score_images
    from .metrics.samples import SampleMetrics
    from .options import parse_args
    from .report.plan import debug_batch, plan
    from .report.plots import plot_training
    from .report.summary import summary
    from .training.arguments import DiffusionTrainingArguments
    from .training.callbacks.ema import EMACallback
    from .training.callbacks.progressive import ProgressiveResolution
    from .training.chosen_family import FamilyArguments, chosen_family
    from .training.finish import finish
    from .training.fit_memory import fit_memory
    from .training.preference_arguments import PreferenceTrainingArguments
    from .training.preferences import DiffusionDPOTrainer, load_reference
    from .training.prepare import (
        build_cache_for,
        prepare_class_images,
        prepare_data,
        prepare_groups,
        prepare_microscopy,
        prepare_prompts,
    )
    from .training.reward_arguments import RewardTrainingArguments
    from .training.reward_prompts import PromptArguments, Prompts
    from .training.rewards import DiffusionRewardTrainer
    from .training.trainer import DiffusionTrainer

# Public name -> module, as the imports above say to type checkers. Here they happen at first use, so that
# `import sciflow_hf` and `--help` load no torch models.
_PUBLIC = {
    alias.name: node.module
    for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    if isinstance(node, ast.ImportFrom) and node.level
    for alias in node.names
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
