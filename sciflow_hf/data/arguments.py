"""`DataArguments`: where the data is. `load_data`: the cache, built first where only images are given."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sciflow_hf.errors import SciflowError

if TYPE_CHECKING:
    from .cache import LatentCache

logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """Data of a run.

    Args:
        dataset_dir: one or more caches: folders that hold an index (parquet) and its payload.
        payload_dir: where `cache_path` is rooted; default: `dataset_dir`, then the index file's folder.
        input_dir: folder of captioned images, or a data set; a cache is built from it in `dataset_dir` first
            (default `<output_dir>/cache`). What is built already is not built again.
        caption_column: column of `input_dir` with the captions.
        resolution: pixels; images are brought to about resolution x resolution, in aspect-ratio buckets.
        encode_batch_size: images encoded at once.
        strict: a broken image of `input_dir` is an error, not a skip.
        eval_fraction: share of the groups (`paper_id`, else image) held out; by hash, so it never moves.
        caption_dropout: share of samples trained with the empty prompt.
        max_train_samples: use that many rows only, spread over the cache; for a first try.
    """

    dataset_dir: list[str] = field(default_factory=list, metadata={"help": "One or more caches."})
    payload_dir: str | None = field(default=None, metadata={"help": "Where `cache_path` of the index is rooted."})
    input_dir: str | None = field(
        default=None,
        metadata={"help": "Captioned images; a cache is built from them in --dataset_dir first."},
    )
    caption_column: str = field(default="caption", metadata={"help": "Column of --input_dir with the captions."})
    resolution: int = field(default=1024, metadata={"help": "Images become about resolution x resolution pixels."})
    encode_batch_size: int = field(default=1, metadata={"help": "Images encoded at once for the cache."})
    strict: bool = field(default=False, metadata={"help": "Stop at a broken image instead of skipping it."})
    eval_fraction: float = field(default=0.05, metadata={"help": "Share of the groups held out for eval_loss."})
    caption_dropout: float = field(default=0.0, metadata={"help": "Share of samples with the empty prompt."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many samples only."})

    def __post_init__(self) -> None:
        for name in ("eval_fraction", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise SciflowError(f"`{name}` {getattr(self, name)}: in [0, 1).")
        if not self.dataset_dir and not self.input_dir:
            raise SciflowError("give `--dataset_dir` (a cache) or `--input_dir` (a folder of captioned images).")
        if self.input_dir and len(self.dataset_dir) > 1:
            raise SciflowError(f"`dataset_dir` {self.dataset_dir}: with `--input_dir` it is the one cache to build.")

    def names(self) -> list[str]:
        """Names of the data for a model card: the last part of each folder."""
        return [Path(folder).resolve().name for folder in ([self.input_dir] if self.input_dir else self.dataset_dir)]


def load_data(args: DataArguments, *, dtype: Any = None) -> tuple["LatentCache", "LatentCache | None"]:
    """The training and the held-out part of the caches of `args`; None where nothing is held out."""
    import torch

    from .cache import load_cache

    dirs: Sequence[str] = args.dataset_dir
    cache = load_cache(dirs if len(dirs) > 1 else dirs[0], payload_dir=args.payload_dir, dtype=dtype or torch.bfloat16)
    train, held_out = cache.split(args.eval_fraction) if args.eval_fraction else (cache, None)
    if args.eval_fraction and (len(train) == 0 or held_out is None or len(held_out) == 0):
        groups = len(set(cache.groups))
        raise SciflowError(
            f"`eval_fraction` {args.eval_fraction} of {groups} groups ({len(cache)} samples) leaves "
            f"{len(train)} samples to train on and {len(held_out or [])} held out. Use another fraction, or 0 for none."
        )
    if args.max_train_samples and args.max_train_samples < len(train):
        step = len(train) / args.max_train_samples
        train = train.select([int(i * step) for i in range(args.max_train_samples)])
    logger.info(
        "%d samples to train on, %d held out (%d groups).",
        len(train), len(held_out or []), len(set(cache.groups)),
    )  # fmt: skip
    return train, held_out
