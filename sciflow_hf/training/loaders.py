"""The loader of a training run, from its options."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..data.batches.loader import BucketLoader, training_sampler
from ..data.stream.loader import StreamLoader
from ..data.stream.stream import StreamingCache
from ..errors import SciflowError
from ..families.base import ModelFamily

if TYPE_CHECKING:
    from .arguments import DiffusionTrainingArguments

logger = logging.getLogger(__name__)


def loader_options(
    args: "DiffusionTrainingArguments", family: ModelFamily, collate_fn: Callable[..., Any]
) -> dict[str, Any]:
    """What training and evaluation read alike."""
    workers = args.dataloader_num_workers
    return {
        "collate_fn": collate_fn,
        "threads": args.dataloader_threads,
        "pads_text": family.pads_text,
        "posterior": family.posterior == "sample",
        "num_workers": workers,
        "pin_memory": args.dataloader_pin_memory and torch.cuda.is_available(),
        "prefetch_factor": args.dataloader_prefetch_factor if workers else None,
    }


def training_loader(
    dataset: Any,
    args: "DiffusionTrainingArguments",
    family: ModelFamily,
    collate_fn: Callable[..., Any],
    *,
    caption_dropout: float,
) -> BucketLoader | StreamLoader:
    """Batches of this rank, of a map-style data set or a stream.

    Raises:
        SciflowError: worker processes for a stream.
    """
    options = loader_options(args, family, collate_fn)
    # A step holds its batches until it is done (`MicroBatches`), while those of the next are read.
    options |= {"caption_dropout": caption_dropout, "buffers": 2 * args.gradient_accumulation_steps + 1}
    options["step_keys"] = args.stratified_levels
    if not isinstance(dataset, StreamingCache):
        sampler = training_sampler(dataset, args, pads_text=family.pads_text)
        logger.info("Buckets of an epoch:\n%s", sampler.table())
        return BucketLoader(dataset, sampler, **options)
    del options["prefetch_factor"]
    if options.pop("num_workers"):
        raise SciflowError("`dataloader_num_workers` does not go with a stream: see `--dataloader_threads`.")
    return StreamLoader(
        dataset,
        batch_size=args.train_batch_size,
        num_replicas=args.world_size,
        rank=args.process_index,
        accumulation_steps=args.gradient_accumulation_steps,
        seed=args.order_seed,
        drop_last=args.dataloader_drop_last,
        **options,
    )
