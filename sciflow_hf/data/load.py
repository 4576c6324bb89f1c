"""Open caches: as a data set of rows, as a stream, or as the two parts that a run trains on and holds out."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..errors import CacheError, SciflowError, counted
from .arguments import DataArguments
from .batches.sizes import FITS
from .cache import LatentCache, open_index
from .layouts.base import NO_LATENTS
from .online import OnlineImages
from .prior import Prior
from .row_filter import RowFilter
from .split import spread
from .storage import use_disk_cache
from .stream.stream import StreamingCache

logger = logging.getLogger(__name__)

_PathLike = str | os.PathLike[str]


def load_cache(
    dataset_dir: _PathLike | Sequence[_PathLike],
    *,
    payload_dir: _PathLike | None = None,
    streaming: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    row_filter: Sequence[str] = (),
) -> LatentCache | StreamingCache:
    """Open a cache: every parquet file below `dataset_dir`, checked against each other.

    Args:
        dataset_dir: folder of a cache, a parquet file, or several of these (joined in the given order).
        payload_dir: where `cache_path` is rooted. By default, per index file, `dataset_dir` or else the
            index file's own folder, whichever holds the payloads.
        streaming: a `StreamingCache`, which never holds the complete index.
        dtype: of the floating tensors that are read: bfloat16, float16 or float32.
        row_filter: conditions that rows must meet, such as "quality_tier=High"; see `RowFilter`.

    Raises:
        CacheError: for a missing or empty cache, parts that do not fit together, or a `cache_path` outside
            of its root.
        SciflowError: for another `dtype`, and a `row_filter` that does not fit the columns, or leaves no row.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise SciflowError(f"`dtype` is {dtype}, but must be torch.bfloat16, torch.float16 or torch.float32.")
    if streaming:
        return StreamingCache(dataset_dir, payload_dir=payload_dir, dtype=dtype, row_filter=row_filter)
    return filtered(LatentCache(open_index(dataset_dir, payload_dir=payload_dir), dtype=dtype), row_filter)


def filtered(cache: LatentCache, conditions: Sequence[str]) -> LatentCache:
    """The rows that meet the conditions."""
    if not conditions:
        return cache
    row_filter = RowFilter(conditions)
    table = cache.columns(row_filter.columns)
    mask = row_filter.mask(dict(zip(table.column_names, table.columns, strict=True)), len(cache))
    row_filter.close("`dataset_dir`", cache.column_names)
    view = cache.select(np.flatnonzero(mask))
    view.row_filter = row_filter.texts
    return view


def load_data(
    args: DataArguments,
    *,
    dtype: Any = None,
    online_text: Callable[[list[str]], dict[str, torch.Tensor]] | None = None,
    online_images: OnlineImages | None = None,
) -> tuple[LatentCache | StreamingCache, LatentCache | None]:
    """The training and the held-out part of the caches of `args`; None where nothing is held out.

    With `streaming` the training part is a `StreamingCache`.

    Args:
        args: which caches, and what is held out of them.
        dtype: of the floating tensors; bfloat16 by default.
        online_text: captions -> text tensors (B, ...), for `text_encoding` "online".
        online_images: for `image_encoding` "online"; what is held out is shown without random crops and flips.

    Raises:
        CacheError: for a broken cache, one without the embeddings or latents that are to be read, or the first image
            of a cache that is not found.
    """
    if args.remote_cache_dir:
        use_disk_cache(args.remote_cache_dir, int(args.remote_cache_gb * 1e9))
    where: dict[str, Any] = {"payload_dir": args.payload_dir, "dtype": dtype or torch.bfloat16}
    folders = [*args.dataset_dir, *([] if args.prior_dataset_dir is None else [args.prior_dataset_dir])]
    cache: LatentCache | StreamingCache
    if args.streaming:
        weights = args.dataset_weights or None
        where |= {"shuffle_buffer": args.shuffle_buffer, "weights": weights, "row_filter": args.row_filter}
        cache = StreamingCache(args.dataset_dir, **where)
    else:
        cache = load_cache(folders, **where)
    cache.online_text = online_text
    if online_text is None:
        _check_text(cache, folders)
    if online_images is not None:
        online_images = _fitted(online_images, cache)
        cache.online_images = online_images.fixed()
        _check_images(cache)
    else:
        _check_latents(cache, folders)
    train: LatentCache | StreamingCache
    prior: LatentCache | None = None
    if isinstance(cache, LatentCache) and args.prior_dataset_dir is not None:
        is_prior = cache.source_of_row == len(args.dataset_dir)
        cache, prior = cache.select(np.flatnonzero(~is_prior)), cache.select(np.flatnonzero(is_prior))
    if isinstance(cache, LatentCache):
        cache = filtered(cache, args.row_filter)
    train, held_out = cache.split(args.eval_fraction) if args.eval_fraction else (cache, None)
    held_out = held_out or None  # of a single group nothing is held out: a warning has said so
    if isinstance(train, LatentCache):
        train = _chosen(train, args)
        train = train if prior is None else _with_prior(train, prior, loss_weight=args.prior_loss_weight)
    train.online_images = online_images
    samples = counted(len(train) - len(prior or []), "sample")
    logger.info("%s to train on, %d held out.", samples, len(held_out or []))
    return train, held_out


def _chosen(train: LatentCache, args: DataArguments) -> LatentCache:
    """Applies `max_train_samples` and `dataset_weights` to the training part."""
    if args.max_train_samples and args.max_train_samples < len(train):
        train = train.select(spread(len(train), args.max_train_samples))
    if args.dataset_weights:
        train.repeats = repeats_for(train.source_of_row, args.dataset_weights, args.dataset_dir)
    return train


def _check_text(cache: LatentCache | StreamingCache, dirs: Sequence[str]) -> None:
    """CacheError where embeddings are to be read and not stored."""
    source = dirs[0] if cache.metadata.get("embeds") == "none" else None
    if isinstance(cache, LatentCache) and 0 in (lengths := cache.text_lengths):
        source = dirs[int(cache.source_of_row[lengths.index(0)])]
    if source is not None:
        raise CacheError(
            f"`dataset_dir` {source!r} holds no text embeddings. Encode its captions in training by "
            "`--text_encoding online`, or build it again with embeddings (`sciflow-hf cache build --embeds bf16`)."
        )


def _check_latents(cache: LatentCache | StreamingCache, dirs: Sequence[str]) -> None:
    """CacheError where latents are to be read and not stored."""
    if isinstance(cache, StreamingCache):
        found: list[tuple[int, Mapping[str, Any]]] = [(file.source, file.payload) for file in cache.files]
    else:
        found = [(source, reader.payload) for source, reader in zip(cache.file_sources, cache.readers, strict=True)]
    source = next((dirs[source] for source, payload in found if payload.get("latents") == NO_LATENTS), None)
    if source is not None:
        raise CacheError(
            f"`dataset_dir` {source!r} holds no latents. Encode its images in training by `--image_encoding online`, "
            "or build another cache with latents (`sciflow-hf cache build`)."
        )


def _fitted(images: OnlineImages, cache: LatentCache | StreamingCache) -> OnlineImages:
    """The images as the cache shows them: cut or padded."""
    fit = cache.metadata.get("fit", FITS[0])
    if fit != FITS[0] and images.crop:
        raise SciflowError(
            f"`random_crop` shows windows, and the cache was built with `--fit {fit}`, which shows complete images: "
            "leave one of the two out."
        )
    return replace(images, fit=fit)


def _check_images(cache: LatentCache | StreamingCache) -> None:
    """CacheError where the first image of a cache is not there, or where it holds edits."""
    if cache.has_sources:
        raise CacheError(
            "`image_encoding` online: the data holds edits, whose reference images are stored as latents of fixed "
            "views. Train on stored latents (`--image_encoding cached`), or build with `--crops` and `--flip`, which "
            "also crop and mirror the reference images."
        )
    rows = cache.first() if isinstance(cache, StreamingCache) else cache
    for row in np.unique(rows.source_of_row, return_index=True)[1].tolist():
        rows.image(row)


def repeats_for(sources: np.ndarray, weights: Sequence[float], dirs: Sequence[str]) -> np.ndarray:
    """How often an epoch shows each row, (N,), at least 1: draws of the caches are in the ratio of `weights`."""
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
        logger.info("%s: %s, each %.4g times an epoch.", folder, counted(count, "sample"), times)
    return repeats[sources]


def _with_prior(own: LatentCache, prior: LatentCache, *, loss_weight: float) -> LatentCache:
    """The rows of `own`, then those of `prior`, two views of one index; an epoch draws as many of either kind.

    Every row comes at least once an epoch.
    """
    train = own.joined(prior)
    train.prior = Prior(np.arange(len(train)) >= len(own), loss_weight)
    repeats = np.ones(len(own)) if own.repeats is None else own.repeats
    draws = max(repeats.sum(), len(prior))
    train.repeats = np.concatenate([repeats * (draws / repeats.sum()), np.full(len(prior), draws / len(prior))])
    samples = counted(len(prior), "sample")
    logger.info("%s of prior preservation: %.4g times each an epoch.", samples, draws / len(prior))
    return train
