"""`DataArguments`: where the data is. `load_data`: the cache, built first where only images are given."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CacheError, SciflowError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from .cache import LatentCache
    from .stream.stream import StreamingCache

logger = logging.getLogger(__name__)

TEXT_ENCODINGS = ("cached", "online")
PAYLOADS = ("shards", "inline", "npz")


@dataclass
class DataArguments:
    """Data of a run.

    Args:
        dataset_dir: one or more caches: folders that hold an index (parquet) and its payload.
        dataset_weights: one number a cache: how many samples of each an epoch draws, in proportion. Every sample
            comes at least once, and the epoch is as short as that allows.
        payload_dir: where `cache_path` is rooted; default: `dataset_dir`, then the index file's folder.
        text_encoding: "cached" reads stored embeddings; "online" encodes captions in training, by the frozen text
            encoder beside the network, and needs none.
        input_dir: folder of captioned images, or a data set; a cache is built from it in `dataset_dir` first
            (default `<output_dir>/cache`). What is built already is not built again.
        caption_column: column of `input_dir` with the captions.
        payload: layout of that cache: shards (embeddings once per distinct prompt), inline (streams) or npz.
        resolution: pixels; images are brought to about resolution x resolution, in aspect-ratio buckets.
        encode_batch_size: images encoded at once.
        strict: a broken image of `input_dir` is an error, not a skip.
        eval_fraction: share of the groups (`paper_id`, else image) held out; by hash, so it never moves.
        caption_dropout: share of samples trained with the empty prompt.
        prior_dataset_dir: a cache of images of the general kind that the network is to keep drawing as it did (prior
            preservation, Ruiz et al. 2023). An epoch draws as many of them as of the others; none is held out.
        prior_loss_weight: the loss is the mean over the other samples + this x the mean over those, as in diffusers'
            scripts.
        max_train_samples: use that many rows only, spread over the cache; for a first try.
        streaming: read the index as it goes by, too; for caches on a Hub or in object storage.
        shuffle_buffer: index rows that a stream holds to shuffle them; 0 keeps the order of the files.
        remote_cache_dir: folder for copies of what is read from URLs; none by default.
        remote_cache_gb: most that it may take.
    """

    dataset_dir: list[str] = field(default_factory=list, metadata={"help": "One or more caches."})
    dataset_weights: list[float] = field(
        default_factory=list,
        metadata={"help": "One number a cache: samples of each are drawn in this proportion."},
    )
    payload_dir: str | None = field(default=None, metadata={"help": "Where `cache_path` of the index is rooted."})
    text_encoding: str = field(
        default="cached",
        metadata={"help": "cached, or online: captions are encoded in training, caches need no embeddings."},
    )
    input_dir: str | None = field(
        default=None,
        metadata={"help": "Captioned images; a cache is built from them in --dataset_dir first."},
    )
    payload: str = field(default="shards", metadata={"help": "Layout of that cache: shards, inline or npz."})
    caption_column: str = field(default="caption", metadata={"help": "Column of --input_dir with the captions."})
    resolution: int = field(default=1024, metadata={"help": "Images become about resolution x resolution pixels."})
    encode_batch_size: int = field(default=1, metadata={"help": "Images encoded at once for the cache."})
    strict: bool = field(default=False, metadata={"help": "Stop at a broken image instead of skipping it."})
    eval_fraction: float = field(default=0.05, metadata={"help": "Share of the groups held out for eval_loss."})
    caption_dropout: float = field(default=0.0, metadata={"help": "Share of samples with the empty prompt."})
    prior_dataset_dir: str | None = field(
        default=None, metadata={"help": "A cache for prior preservation: images that the network shall not unlearn."}
    )
    prior_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the mean loss on that cache."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many samples only."})
    streaming: bool = field(default=False, metadata={"help": "Read the index as it goes by; needs --max_steps."})
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Index rows that a stream holds to shuffle."})
    remote_cache_dir: str | None = field(default=None, metadata={"help": "Folder for copies of what URLs give."})
    remote_cache_gb: float = field(default=50.0, metadata={"help": "Most that --remote_cache_dir may take."})

    def __post_init__(self) -> None:
        for name in ("eval_fraction", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise SciflowError(f"`{name}` {getattr(self, name)}: in [0, 1).")
        if not self.dataset_dir and not self.input_dir:
            raise SciflowError("give `--dataset_dir` (a cache) or `--input_dir` (a folder of captioned images).")
        if self.input_dir and len(self.dataset_dir) > 1:
            raise SciflowError(f"`dataset_dir` {self.dataset_dir}: with `--input_dir` it is the one cache to build.")
        for name, allowed in (("text_encoding", TEXT_ENCODINGS), ("payload", PAYLOADS)):
            if getattr(self, name) not in allowed:
                raise SciflowError(f"`{name}` {getattr(self, name)!r}: use one of {', '.join(allowed)}.")
        if self.shuffle_buffer < 0:
            raise SciflowError(f"`shuffle_buffer` {self.shuffle_buffer}: at least 0.")
        if not self.remote_cache_gb > 0:
            raise SciflowError(f"`remote_cache_gb` {self.remote_cache_gb}: above 0.")
        self._check_weights()
        self._check_prior()
        if self.streaming and self.max_train_samples:
            raise SciflowError("`max_train_samples` does not go with `--streaming`, which sees no row before it comes.")

    def _check_weights(self) -> None:
        caches = max(len(self.dataset_dir), 1)
        if self.dataset_weights and len(self.dataset_weights) != caches:
            raise SciflowError(
                f"`dataset_weights` {self.dataset_weights}: {len(self.dataset_weights)} numbers for {caches} "
                f"cache{'s' * (caches > 1)} in `--dataset_dir`. Give one for each."
            )
        if not all(0 < weight < math.inf for weight in self.dataset_weights):
            raise SciflowError(
                f"`dataset_weights` {self.dataset_weights}: numbers above 0. Leave a cache out of `--dataset_dir` "
                "where none of it is wanted."
            )

    def _check_prior(self) -> None:
        if not 0 <= self.prior_loss_weight < math.inf:
            raise SciflowError(f"`prior_loss_weight` {self.prior_loss_weight}: at least 0.")
        if self.prior_dataset_dir is None:
            if self.prior_loss_weight != 1:
                raise SciflowError(
                    f"`prior_loss_weight` {self.prior_loss_weight:g} weighs nothing: name the cache of prior "
                    "preservation by `--prior_dataset_dir`."
                )
            return
        if self.streaming:
            raise SciflowError("`prior_dataset_dir` does not go with `--streaming`: read the index whole.")
        if any(same_place(self.prior_dataset_dir, folder) for folder in self.dataset_dir):
            raise SciflowError(
                f"`prior_dataset_dir` {self.prior_dataset_dir!r} is in `--dataset_dir`, too. It is to hold other "
                "images: of the general kind that the network shall not unlearn."
            )

    def names(self) -> list[str]:
        """Names of the data for a model card: the last part of each folder."""
        return [Path(folder).resolve().name for folder in ([self.input_dir] if self.input_dir else self.dataset_dir)]


def load_data(
    args: DataArguments,
    *,
    dtype: Any = None,
    online_text: "Callable[[list[str]], dict[str, torch.Tensor]] | None" = None,
) -> tuple["LatentCache | StreamingCache", "LatentCache | None"]:
    """The training and the held-out part of the caches of `args`; None where nothing is held out.

    With `streaming` the training part is a `StreamingCache`.

    Args:
        dtype: of the floating tensors; bfloat16 by default.
        online_text: captions -> text tensors (B, ...), for `text_encoding` "online".

    Raises:
        CacheError: for a broken cache, or one without the embeddings that are to be read.
    """
    import numpy as np
    import torch

    from .cache import LatentCache, load_cache
    from .prior import with_prior
    from .storage import use_disk_cache
    from .stream.stream import open_stream

    if args.remote_cache_dir:
        use_disk_cache(args.remote_cache_dir, int(args.remote_cache_gb * 1e9))
    where: dict[str, Any] = {"payload_dir": args.payload_dir, "dtype": dtype or torch.bfloat16}
    folders = [*args.dataset_dir, *([] if args.prior_dataset_dir is None else [args.prior_dataset_dir])]
    cache: LatentCache | StreamingCache
    if args.streaming:
        weights = args.dataset_weights or None
        cache = open_stream(args.dataset_dir, shuffle_buffer=args.shuffle_buffer, weights=weights, **where)
    else:
        cache = load_cache(folders, **where)
    cache.online_text = online_text
    if online_text is None:
        _check_text(cache, folders)
    train: LatentCache | StreamingCache
    prior: LatentCache | None = None
    if isinstance(cache, LatentCache) and args.prior_dataset_dir is not None:
        is_prior = cache.source_of_row == len(args.dataset_dir)
        cache, prior = cache.select(np.flatnonzero(~is_prior)), cache.select(np.flatnonzero(is_prior))
    train, held_out = cache.split(args.eval_fraction) if args.eval_fraction else (cache, None)
    if args.eval_fraction and (len(train) == 0 or held_out is None or len(held_out) == 0):
        raise SciflowError(
            f"`eval_fraction` {args.eval_fraction} of {len(cache)} samples leaves {len(train)} to train on and "
            f"{len(held_out or [])} held out; those of one `paper_id` stay together. Use another fraction, or 0."
        )
    if isinstance(train, LatentCache):
        train = _chosen(train, args)
        train = train if prior is None else with_prior(train, prior, loss_weight=args.prior_loss_weight)
    logger.info("%d samples to train on, %d held out.", len(train) - len(prior or []), len(held_out or []))
    return train, held_out


def same_place(one: str, other: str) -> bool:
    """Whether two folders or URLs are the same."""
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` rows, evenly."""
    return [int(i * (count / wanted)) for i in range(wanted)]


def _chosen(train: "LatentCache", args: DataArguments) -> "LatentCache":
    """What `max_train_samples` and `dataset_weights` make of the training part."""
    if args.max_train_samples and args.max_train_samples < len(train):
        train = train.select(spread(len(train), args.max_train_samples))
    if args.dataset_weights:
        train.repeats = _repeats(train.source_of_row, args.dataset_weights, args.dataset_dir)
    return train


def _check_text(cache: "LatentCache | StreamingCache", dirs: Sequence[str]) -> None:
    """CacheError where embeddings are to be read and not stored."""
    from .cache import LatentCache

    source = dirs[0] if cache.metadata.get("embeds") == "none" else None
    if isinstance(cache, LatentCache) and 0 in (lengths := cache.text_lengths):
        source = dirs[int(cache.source_of_row[lengths.index(0)])]
    if source is not None:
        raise CacheError(
            f"`dataset_dir` {source!r} holds no text embeddings. Encode its captions in training by "
            "`--text_encoding online`, or build it again with embeddings (`sciflow-hf cache build --embeds bf16`)."
        )


def _repeats(sources: "np.ndarray", weights: Sequence[float], dirs: Sequence[str]) -> "np.ndarray":
    """How often an epoch shows each row, (N,), at least 1: draws of the caches are in the ratio of `weights`."""
    import numpy as np

    samples = np.bincount(sources, minlength=len(weights))
    if not samples.all():
        empty = dirs[int(np.argmin(samples))]
        raise SciflowError(
            f"`dataset_weights` {list(weights)}: {empty!r} has no sample to train on. Leave it out, or hold less out "
            "(`--eval_fraction`)."
        )
    repeats = weights / samples
    repeats /= repeats.min()
    for folder, count, times in zip(dirs, samples, repeats, strict=True):
        logger.info("%s: %d samples, each %.4g times an epoch.", folder, count, times)
    return repeats[sources]
