"""From flags to data: the demo's own figures and network, and the cache that is built before training."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.arguments import DataArguments, load_data
from ..families.base import ModelFamily
from .checkpoints import check_output_dir

if TYPE_CHECKING:
    import torch

    from ..data.build.build import BuildReport
    from ..data.cache import LatentCache
    from ..data.stream.stream import StreamingCache
    from .arguments import DiffusionTrainingArguments

logger = logging.getLogger(__name__)

DEMO = "demo"
DEMO_NIGHT = "demo_night"  # small figures that `mini_klein` is fine-tuned on


def build_cache_for(
    family: ModelFamily,
    input_dir: str,
    output_dir: str,
    *,
    device: Any = "cpu",
    encoder_dtype: Any = None,
    **options: Any,
) -> "BuildReport":
    """Builds a cache of `input_dir` with the encoders of `family`; `options` are those of `build_cache`.

    The encoders are loaded at first use: where nothing is left to encode, they never are.
    """
    import torch

    from ..data.build.build import build_cache

    @functools.cache
    def encoders() -> Any:
        text = options.get("embeds") != "none"
        return family.load_encoders(device=device, dtype=encoder_dtype or torch.float32, text=text)

    return build_cache(
        input_dir,
        output_dir,
        encode_images=lambda pixel_values: family.encode_images(pixel_values, encoders()),
        encode_prompts=lambda prompts: family.encode_prompts(prompts, encoders()),
        settings=family.encoder_settings(),
        bucket_step=family.bucket_step(),
        time_ids=family.stores_time_ids,
        **options,
    )


def online_text(family: ModelFamily, *, device: Any, dtype: Any) -> "Callable[[list[str]], dict[str, torch.Tensor]]":
    """A function: captions -> what `family.encode_prompts` makes of them, (B, ...) on `device`, without gradients.

    A caption that a batch has twice is encoded once. The encoder is loaded at first use: a dry run needs none.
    """

    @functools.cache
    def encoders() -> Any:
        return family.load_text_encoder(device=device, dtype=dtype)

    def encode(captions: list[str]) -> dict[str, "torch.Tensor"]:
        distinct = list(dict.fromkeys(captions))
        rows = [distinct.index(caption) for caption in captions]
        return {name: value[rows] for name, value in family.encode_prompts(distinct, encoders()).items()}

    return encode


def resolve_demo(family: ModelFamily, data_args: DataArguments, output_dir: str) -> None:
    """Replaces `demo` (figures: or `demo_night`) in the options by what is made below `output_dir` at first use."""
    folder = Path(output_dir) / "demo"
    if family.pretrained_model_name_or_path == DEMO:
        from ..demo import demo_pipeline

        family.pretrained_model_name_or_path = str(demo_pipeline(folder, family.name))
    if data_args.input_dir in (DEMO, DEMO_NIGHT):
        from ..demo import demo_figures

        data_args.input_dir = str(demo_figures(folder, data_args.input_dir))


def prepare_data(
    data_args: DataArguments, family: ModelFamily, args: "DiffusionTrainingArguments"
) -> tuple["LatentCache | StreamingCache", "LatentCache | None"]:
    """The training and held-out data; with `--input_dir` the cache is built first, by all ranks, resumable."""
    from accelerate import PartialState

    device = args.device  # sets up the process group in the way of TrainingArguments
    state = PartialState()
    if state.is_main_process:
        if not (args.dry_run or args.debug_batch):  # say so before hours of encoding and loading
            check_output_dir(args.output_dir, resume=args.resume_from_checkpoint, overwrite=args.overwrite_output_dir)
        resolve_demo(family, data_args, args.output_dir)
    state.wait_for_everyone()
    resolve_demo(family, data_args, args.output_dir)
    online = data_args.text_encoding == "online"
    if data_args.input_dir:
        directory = data_args.dataset_dir[0] if data_args.dataset_dir else str(Path(args.output_dir) / "cache")
        build_cache_for(
            family,
            data_args.input_dir,
            directory,
            device=device,
            encoder_dtype=args.weight_dtype,
            resolution=data_args.resolution,
            caption_column=data_args.caption_column,
            batch_size=data_args.encode_batch_size,
            strict=data_args.strict,
            payload=data_args.payload,
            embeds="none" if online else "bf16",
            rank=state.process_index,
            world_size=state.num_processes,
            barrier=state.wait_for_everyone,
        )
        state.wait_for_everyone()
        data_args = dataclasses.replace(data_args, input_dir=None, dataset_dir=[directory])
    encode = online_text(family, device=device, dtype=args.weight_dtype) if online else None
    return load_data(data_args, dtype=args.weight_dtype, online_text=encode)
