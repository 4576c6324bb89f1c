"""From flags to images with class labels, as pixels or as a cache of VAE latents."""

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.arguments import spread
from ..errors import SciflowError
from ..families.dit import DiT
from ..images.class_latents import ClassLatents
from ..images.class_source import ClassImageArguments
from .checkpoints import check_output_dir

if TYPE_CHECKING:
    from ..data.build.build import BuildReport
    from .arguments import DiffusionTrainingArguments

logger = logging.getLogger(__name__)


def prepare_class_images(
    data_args: ClassImageArguments, family: DiT, args: "DiffusionTrainingArguments"
) -> tuple[Any, Any]:
    """The training and the held-out images; tells `family` the number of channels and the names of the classes.

    Raises:
        SciflowError: an output folder with checkpoints and no word on them, or data that cannot be used.
    """
    from accelerate import PartialState

    from ..demo.digits import DIGITS, write_digits
    from ..images.classes import load_class_images

    _ = args.device  # sets up the process group in the way of TrainingArguments
    state = PartialState()
    if state.is_main_process:
        if not (args.dry_run or args.debug_batch):
            check_output_dir(args.output_dir, resume=args.resume_from_checkpoint, overwrite=args.overwrite_output_dir)
        if data_args.input_dir == DIGITS:
            write_digits(Path(args.output_dir) / "data" / DIGITS)
    state.wait_for_everyone()
    if data_args.input_dir == DIGITS:
        data_args.input_dir, data_args.eval_split = str(Path(args.output_dir) / "data" / DIGITS), "test"
    family.check_size(family.image_size)
    if family.has_vae:
        return _latents(data_args, family, args, state)
    if not data_args.input_dir:
        raise SciflowError("`dataset_dir` holds latents: name their VAE (`--vae_name_or_path`), or give `--input_dir`.")
    with state.main_process_first():  # `datasets` writes its own cache
        train, held_out = load_class_images(data_args, image_size=family.image_size, num_classes=family.num_classes)
    if family.in_channels not in (None, train.channels):
        raise SciflowError(
            f"`in_channels` {family.in_channels}: the images have {train.channels}. Leave it out, or convert them by "
            "`--image_mode`."
        )
    family.in_channels, family.num_classes, family.class_names = train.channels, train.num_classes, train.class_names
    return train, held_out


def build_class_cache(
    data_args: ClassImageArguments,
    family: DiT,
    output_dir: str,
    *,
    split: str | None = None,
    device: Any = "cpu",
    encoder_dtype: Any = None,
    **options: Any,
) -> "BuildReport":
    """Builds a cache of one split with the VAE of `family`: squares of `image_size`, classes in the column `label`.

    Args:
        split: default `data_args.train_split`.
        options: of `build_cache`.
    """
    import torch

    from ..data.build.build import build_cache
    from ..images.class_latents import class_records
    from ..images.class_source import ClassSource

    family.check_size(family.image_size)
    records, names = class_records(ClassSource(data_args, split or data_args.train_split), family.num_classes)

    @functools.cache
    def encoders() -> Any:
        return family.load_encoders(device=device, dtype=encoder_dtype or torch.float32)

    side = family.image_size
    return build_cache(
        str(data_args.input_dir),
        output_dir,
        encode_images=lambda pixel_values: family.encode_images(pixel_values, encoders()),
        encode_prompts=lambda prompts: family.encode_prompts(prompts, None),  # never: nothing of text is stored
        settings=family.encoder_settings() | {"class_names": names},
        bucket_step=family.bucket_step(),
        resolution=side,
        records=records,
        buckets=[(side, side)],
        embeds="none",
        **options,
    )


def _latents(
    data_args: ClassImageArguments, family: DiT, args: "DiffusionTrainingArguments", state: Any
) -> tuple[Any, Any]:
    """The training and the held-out latents; with `input_dir` the caches are built first, by all ranks, resumable."""
    from ..data.cache import load_cache

    folders = {data_args.train_split: data_args.dataset_dir}
    if data_args.input_dir:
        if len(data_args.dataset_dir) > 1:
            raise SciflowError(f"`dataset_dir` {data_args.dataset_dir}: with `--input_dir` it is the one to build.")
        root = Path(data_args.dataset_dir[0] if data_args.dataset_dir else Path(args.output_dir) / "cache")
        splits = [split for split in (data_args.train_split, data_args.eval_split) if split]
        folders = {split: [str(root / split)] for split in splits}
        for split, (folder,) in folders.items():
            build_class_cache(
                data_args,
                family,
                folder,
                split=split,
                device=args.device,
                encoder_dtype=args.weight_dtype,
                batch_size=data_args.encode_batch_size,
                flip=data_args.flip and split == data_args.train_split,
                rank=state.process_index,
                world_size=state.num_processes,
                barrier=state.wait_for_everyone,
            )
            state.wait_for_everyone()
    caches: Any = [load_cache(folder, dtype=args.weight_dtype) for folder in folders.values()]
    train, held_out = caches if len(caches) == 2 else caches[0].split(data_args.eval_fraction)
    if data_args.max_train_samples and data_args.max_train_samples < len(train):
        train = train.select(spread(len(train), data_args.max_train_samples))
    if family.num_classes != 0:
        train, held_out = (ClassLatents.of(cache) for cache in (train, held_out))
        _check_classes(family, train, held_out)
    logger.info("%d latents of %d classes to train on, %d held out.", len(train), family.num_classes, len(held_out))
    return train, held_out if len(held_out) else None


def _check_classes(family: DiT, *caches: ClassLatents) -> None:
    """Takes the classes from the caches; refuses labels beyond `num_classes`."""
    names = caches[0].class_names
    largest = max(int(cache.class_labels.max()) for cache in caches if len(cache))
    family.num_classes = len(names) if family.num_classes is None else family.num_classes
    if largest >= family.num_classes:
        raise SciflowError(
            f"`num_classes` {family.num_classes}: the cache has the label {largest}. Raise it, or mend that."
        )
    family.class_names = [*names, *map(str, range(len(names), family.num_classes))][: family.num_classes]
