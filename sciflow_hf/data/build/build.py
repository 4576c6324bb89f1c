"""Build a cache: every captioned image is encoded once, whatever happens in between."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...errors import SciflowError
from ..batches.buckets import aspect_ratio_buckets
from .blocks import Layout, locked
from .jobs import by_bucket, find_jobs
from .packing import InlineStore, ShardStore
from .sources import Record, find_records
from .stores import NpzStore, Skips, Store
from .work import Work
from .writing import check_output, readable_bytes

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STORES: dict[str, type[Store]] = {"shards": ShardStore, "inline": InlineStore, "npz": NpzStore}
_Tensors = dict[str, torch.Tensor]


@dataclass
class BuildReport:
    """What a build did, on all ranks together (on rank 0; the others know of their own work only).

    Attributes:
        output_dir: the cache.
        samples: rows of its index.
        encoded: samples that this run encoded.
        reused: samples that an earlier run had encoded.
        skipped: (file, reason) of the images that are not in the cache.
        bytes: size of the payloads in the index.
    """

    output_dir: Path
    samples: int = 0
    encoded: int = 0
    reused: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    bytes: int = 0


def build_cache(
    input_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    encode_images: Callable[[torch.Tensor], _Tensors],
    encode_prompts: Callable[[list[str]], _Tensors],
    settings: Mapping[str, Any],
    bucket_step: int,
    resolution: int = 1024,
    caption_column: str = "caption",
    batch_size: int = 1,
    strict: bool = False,
    dtype: str = "bf16",
    samples_per_part: int = 500,
    payload: str = "shards",
    embeds: str = "bf16",
    codec: str = "none",
    crops: int = 0,
    flip: bool = False,
    time_ids: bool = False,
    records: Sequence[Record] | None = None,
    buckets: Sequence[tuple[int, int]] | None = None,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> BuildReport:
    """Encode captioned images into a cache, or go on with one that was interrupted.

    Each sample becomes a file of its own, which appears whole or not at all, so that after a kill nothing
    finished is encoded again; `shards` and `inline` join these files part by part. The index follows from the
    input alone: after images were added or captions changed, the same call encodes what is new and writes the
    index anew.

    Args:
        input_dir: folder of images with captions, folder of `datasets.save_to_disk`, parquet files, or a Hub
            data set. A column `loss_mask` (images, or paths relative to the folder) is stored, too.
        output_dir: the cache.
        encode_images: (B, 3, H, W) float32 in [-1, 1] -> `latents` (B, C, h, w) and extras.
        encode_prompts: list of B prompts -> `prompt_embeds` (B, L, D) and extras, as `text_ids` (B, L, n).
        settings: what the encoders' results depend on; kept with the cache, JSON-able.
        bucket_step: height and width of the encoded images are multiples of it (pixels).
        resolution: the buckets have about resolution**2 pixels.
        caption_column: column of the metadata with the captions.
        batch_size: images encoded at once.
        strict: an image that cannot be used is an error; otherwise it is named, skipped and counted.
        dtype: of the floating arrays: bf16, fp16 or fp32.
        samples_per_part: rows of one index file.
        payload: "shards" (safetensors, embeddings once per distinct prompt), "inline" (parquet files that
            stream), or "npz" (one file a sample, `<paper_id or hash>/<id>_latents.npz`).
        embeds: "bf16" (as `dtype` says), "fp8", or "none": no embeddings, prompts are encoded in training.
        codec: "none" or "zstd" (lossless).
        crops: windows at fixed random places of each image, as rows beside the whole image's.
        flip: a mirror image of each row, as a row.
        time_ids: store `time_ids` (6,) with each row: original height and width, top and left of the crop in the
            resized image, height and width, in pixels, as SDXL is told them.
        records: the images themselves, in place of those found in `input_dir`.
        buckets: (height, width) in pixels; by default aspect ratios of about resolution**2 pixels.
        rank: which of `world_size` processes this is; each encodes its share.
        world_size: processes that call this with the same arguments.
        barrier: waits for all of them.

    Raises:
        SciflowError: for an unusable input, an `output_dir` that was built with other settings or is being
            built, a full disk, and with `strict` for the first image that cannot be used.
    """
    counts = {"batch_size": batch_size, "samples_per_part": samples_per_part, "bucket_step": bucket_step}
    for name, value in counts.items():
        if value < 1:
            raise SciflowError(f"`{name}` is {value}, but must be at least 1.")
    if dtype not in DTYPES:
        raise SciflowError(f"`dtype` is {dtype!r}, but must be one of {', '.join(DTYPES)}.")
    if resolution < bucket_step:
        raise SciflowError(f"`resolution` is {resolution}, but image sides are multiples of {bucket_step}.")
    if crops < 0:
        raise SciflowError(f"`crops` is {crops}, but must be at least 0.")
    if not 0 <= rank < world_size:
        raise SciflowError(f"`rank` is {rank}, but must lie in [0, world_size) = [0, {world_size}).")
    layout = Layout(payload, embeds, codec, DTYPES[dtype])
    if (payload, embeds) == ("npz", "none"):
        raise SciflowError(
            "`payload` is npz, which always stores embeddings (`embeds` is 'none'). Choose shards or inline."
        )
    output = Path(output_dir)
    facts = json.loads(json.dumps({**settings, "dtype": dtype, "resolution": resolution}))  # tuples become lists
    fixed = facts | {"bucket_step": bucket_step, "payload": payload, "embeds": embeds, "codec": codec}
    check_output(output, fixed)
    if flip and rank == 0:
        logger.warning("`flip`: mirrored text cannot be read, and captions that say left or right become wrong.")

    # Steps of 1/16 of the resolution, as in SDXL (64 at 1024): few enough buckets for full batches.
    step = bucket_step * max(1, resolution // (16 * bucket_step))
    buckets = aspect_ratio_buckets(resolution, step) if buckets is None else buckets
    skipped: list[tuple[str, str]] = []
    if records is None:
        records, skipped = find_records(input_dir, caption_column=caption_column, leave_out=output)
    skips = Skips(strict, first_rank=rank == 0)
    for name, reason in skipped:
        skips.on_every_rank(name, reason)
    store_type = STORES[payload]
    found = find_jobs(
        records, buckets, resolution=resolution, crops=crops, flip=flip, with_caption=store_type.with_text,
        skip=skips.on_every_rank,
    )  # fmt: skip
    jobs = by_bucket(found, batch_size)
    if not jobs:
        raise SciflowError(
            f"`input_dir` is {str(input_dir)!r}: none of its images can be read. First: {skips.first()}."
        )
    store = store_type(output, jobs, facts | {"version": __version__}, layout, skips)
    work = Work(
        store, jobs, encode_images, encode_prompts, skips,
        settings=fixed, batch_size=batch_size, samples_per_part=samples_per_part,
        time_ids=time_ids, rank=rank, world_size=world_size, barrier=barrier,
    )  # fmt: skip
    with locked(output) if rank == 0 else contextlib.nullcontext():
        work.run()
    report = BuildReport(output, work.samples, work.encoded, work.reused, list(skips.found.items()), work.bytes)
    if rank == 0:
        if not report.samples:
            raise SciflowError(f"`input_dir` is {str(input_dir)!r}: no image could be used. First: {skips.first()}.")
        logger.info(
            "%s: %d samples (%d encoded now, %d before), %d skipped, %s.",
            output, report.samples, report.encoded, report.reused, len(report.skipped),
            readable_bytes(report.bytes),
        )  # fmt: skip
    return report
