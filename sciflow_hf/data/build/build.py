"""Build a cache: every captioned image is encoded once, whatever happens in between."""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm import tqdm

from ... import __version__
from ...diffusion.sources import source_name
from ...errors import SciflowError, counted
from ..batches.loader import text_rows
from ..batches.sizes import BUCKETS, FITS, MAX_ASPECT_RATIO, ladder
from ..cache import EMPTY_PROMPT_FILE, PLANNED
from ..layouts.base import METADATA_KEY, NO_LATENTS, Layout, index_file
from ..layouts.npz import write_npz
from ..row_filter import RowFilter
from ..writing import output_file, readable_bytes
from .ahead import THREADS, Behind, in_order
from .block_staging import InlineStaging, ShardStaging
from .blocks import BUILD_FILE, locked, noted_settings, remove_temporaries, write_settings
from .cut import CUT, CountTokens, cut_text, find_cut, lengths_text, warn_of_cut
from .jobs import (
    Job,
    Prompt,
    by_bucket,
    find_bucket_columns,
    find_jobs,
    have_regions,
    in_batches,
    shape_measures,
    source_measures,
)
from .reading import Pixels, read_source, read_views
from .references import SourceRules, SourceView
from .sources.edits import EDIT_MASKS
from .sources.find import find_records
from .sources.record import Record
from .staging import FOLDER, NpzStaging, Shared, Skips, Staging
from .tally import Tally
from .views import MIRRORED, average_mask, largest_mask

logger = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 30
_TEXT_BATCHES = 4  # whose embeddings wait in memory for the images that are stored with them
_LATE = 2  # encoded batches that wait to be saved
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STAGING: dict[str, type[Staging]] = {"shards": ShardStaging, "inline": InlineStaging, "npz": NpzStaging}
RULES = 2
"""Noted in `BUILD_FILE`: samples are known by content, small images not enlarged. Earlier versions note nothing."""
SHAPES = {"buckets": BUCKETS[0], "max_aspect_ratio": MAX_ASPECT_RATIO, "fit": FITS[0]}
"""Settings of a build that are noted where they are others."""
_OLDER = {"payload": "npz", "embeds": "bf16", "codec": "none"}  # before there were other layouts
T = TypeVar("T")
_Tensors = dict[str, torch.Tensor]
_Encode = Callable[..., _Tensors]


@dataclass
class BuildReport:
    """Report of a build, on all ranks together (on rank 0; the others know of their own work only).

    Attributes:
        output_dir: the cache.
        samples: rows of its index.
        encoded: samples that this run encoded.
        reused: samples that an earlier run had encoded.
        skipped: (file, reason) of the images that are not in the cache.
        bytes: size of the payloads in the index.
        tally: what became of everything in the input; the table that a build ends with.
        records: the captioned images of the input, skipped ones included.
    """

    output_dir: Path
    samples: int = 0
    encoded: int = 0
    reused: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    bytes: int = 0
    tally: Tally = field(default_factory=Tally)
    records: Sequence[Record] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Plan:
    """Where a dry run writes its index, and the shapes of what is not encoded.

    Attributes:
        folder: for its index.
        latent_shape: (height, width) of a bucket -> (C, h, w).
        text_shape: (L, D), the most that a caption may have; None: no text is stored.
    """

    folder: Path
    latent_shape: Callable[[int, int], Sequence[int]]
    text_shape: Sequence[int] | None


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
    split: str | None = None,
    batch_size: int = 1,
    text_batch_size: int = 8,
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
    buckets: Sequence[tuple[int, int]] | str = BUCKETS[0],
    max_aspect_ratio: float = MAX_ASPECT_RATIO,
    fit: str = FITS[0],
    enlarge: bool = False,
    count_tokens: CountTokens | None = None,
    latent_shape: Callable[[int, int], Sequence[int]] | None = None,
    sources: SourceRules | None = None,
    source_dir: Sequence[str | os.PathLike[str]] = (),
    source_column: Sequence[str] = (),
    edit_masks: str = "given",
    row_filter: Sequence[str] = (),
    plan: Plan | None = None,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> BuildReport:
    """Encode captioned images into a cache, or continue one that was interrupted.

    Each sample becomes a file of its own, which appears complete or not at all, so that after a kill nothing
    finished is encoded again; `shards` and `inline` join these files part by part. The index follows from the
    input alone: after images were added or captions changed, the same call encodes what is new and writes the
    index anew.

    Args:
        input_dir: folder of images with captions, folder of `datasets.save_to_disk`, parquet files, or a Hub
            data set. A column `loss_mask` (images, or paths relative to the folder) is also stored.
        output_dir: the cache.
        encode_images: (B, 3, H, W) float32 in [-1, 1] -> `latents` (B, C, h, w) and extras.
        encode_prompts: list of B prompts -> `prompt_embeds` (B, L, D) and extras, as `text_ids` (B, L, n).
        settings: what the encoders' results depend on; kept with the cache, JSON-able.
        bucket_step: height and width of the encoded images are multiples of it (pixels).
        resolution: the buckets have about resolution**2 pixels; those of smaller images a half, a quarter, ... of that.
        caption_column: column of the metadata with the captions.
        split: of an input with several: a name, several joined by "+", or "all"; by default train, or the only one.
        batch_size: images encoded at once.
        text_batch_size: prompts encoded at once, of about one length; each distinct prompt once.
        strict: what cannot be used of that which was meant (an image, a captioned file of another format, an entry of
            the metadata) is an error; otherwise it is named, skipped and counted.
        dtype: of the floating arrays: bf16, fp16 or fp32.
        samples_per_part: rows of one index file.
        payload: "shards" (safetensors, embeddings once per distinct prompt), "inline" (parquet files that
            stream), or "npz" (one file a sample, `<paper_id or hash>/<id>_latents.npz`).
        embeds: "bf16" (as `dtype` says), "fp8", or "none": no embeddings, prompts are encoded in training.
        codec: "none" or "zstd" (lossless).
        crops: windows at fixed random places of each image, as rows next to the complete image's.
        flip: a mirror image of each row, as a row.
        time_ids: store `time_ids` (6,) with each row: original height and width, top and left of the crop in the
            resized image, height and width, in pixels, as SDXL is told them.
        records: the images themselves, instead of those found in `input_dir`.
        buckets: (height, width) in pixels, of which each image gets the nearest by aspect ratio; or which are made by
            `ladder`: "resolution", of about one area, or "equal_tokens", of one number of tokens; or "given": each row
            names its own in the columns `bucket_w` and `bucket_h`, or `width` and `height`.
        max_aspect_ratio: of those buckets, from 1 to 4.
        fit: "cut": an image covers its bucket and loses the excess at two edges; "pad": it fits into the bucket, around
            it the colour of its page, which the loss does not see (`loss_mask`). Windows of `crops` are not padded.
        enlarge: bring small images to about resolution**2 pixels as well.
        count_tokens: prompts -> (tokens of each, how many `encode_prompts` reads), to tell which captions are cut.
        latent_shape: store no latents, but in the index their shape, which this gives for the (height, width) of a
            bucket: images are read to find broken ones, and encoded in training. A cache that has latents keeps them.
        sources: how reference images of rows are encoded; None: rows that have some are refused.
        source_dir: folders with a reference image for each image, of the same file name; the first holds source 0.
        source_column: columns with the reference images of a row; by default `source_image`, where there is one.
        edit_masks: "given", or "computed": where an edit has no mask, what differs between it and its first source,
            if that is of its size.
        row_filter: conditions that rows must meet, such as "quality_tier=High"; see `RowFilter`.
        plan: nothing is encoded, and nothing written to `output_dir`: an index without payload goes elsewhere.
        rank: which of `world_size` processes this is; each encodes its share.
        world_size: processes that call this with the same arguments.
        barrier: waits for all of them.

    Raises:
        SciflowError: for an unusable input, an `output_dir` that was built with other settings or is being
            built, a full disk, and with `strict` for the first image that cannot be used.
    """
    counts = {
        "batch_size": batch_size,
        "text_batch_size": text_batch_size,
        "samples_per_part": samples_per_part,
        "bucket_step": bucket_step,
    }
    for name, value in counts.items():
        if value < 1:
            raise SciflowError(f"`{name}` is {value}, but must be at least 1.")
    if dtype not in DTYPES:
        raise SciflowError(f"`dtype` is {dtype!r}, but must be one of {', '.join(DTYPES)}.")
    if resolution < bucket_step:
        raise SciflowError(f"`resolution` is {resolution}, but image sides are multiples of {bucket_step}.")
    if crops < 0:
        raise SciflowError(f"`crops` is {crops}, but must be at least 0.")
    if buckets == "given" and max_aspect_ratio != MAX_ASPECT_RATIO:
        raise SciflowError(f"`max_aspect_ratio` {max_aspect_ratio:g} does not go with `--buckets given`: leave it out.")
    if fit not in FITS:
        raise SciflowError(f"`fit` is {fit!r}, but must be one of {', '.join(FITS)}.")
    if edit_masks not in EDIT_MASKS:
        raise SciflowError(f"`edit_masks` is {edit_masks!r}, but must be one of {', '.join(EDIT_MASKS)}.")
    if not 0 <= rank < world_size:
        raise SciflowError(f"`rank` is {rank}, but must lie in [0, world_size) = [0, {world_size}).")
    output = Path(output_dir)
    if latent_shape is not None and _holds_latents(output):
        latent_shape = None
    layout = Layout(payload, embeds, codec, DTYPES[dtype], latent_shape)
    for what, name in (("embeddings", embeds), ("latents", NO_LATENTS if latent_shape is not None else "")):
        if (payload, name) == ("npz", "none"):
            raise SciflowError(f"`payload` is npz, which always stores {what}. Choose shards or inline.")
    of_buckets = {"buckets": buckets if isinstance(buckets, str) else BUCKETS[0], "max_aspect_ratio": max_aspect_ratio}
    shapes = {name: value for name, value in {**of_buckets, "fit": fit}.items() if value != SHAPES[name]}
    facts = json.loads(json.dumps({**settings, "dtype": dtype, "resolution": resolution, **shapes}))  # no tuples
    fixed = facts | {"bucket_step": bucket_step, "payload": payload, "embeds": embeds, "codec": codec}
    fixed |= {} if latent_shape is None else {"latents": NO_LATENTS}
    noted = noted_settings(output / BUILD_FILE, SHAPES | fixed, SHAPES | _OLDER)
    if noted and noted["differ"]:
        online = " Its images are encoded in training: `--image_encoding online`." * (
            "`latents` was" in noted["differ"]
        )
        raise SciflowError(
            f"`output_dir` is {str(output)!r}, which was built with other settings: {noted['differ']}.{online} Use "
            "those, or name another folder."
        )
    rules = RULES if noted is None else noted.get("rules", 1)
    if rules < RULES:
        enlarge = True
        if rank == 0:
            logger.warning(
                "%s was begun by an earlier version and is continued by its rules: an edited image whose file is as "
                "long as before is not encoded again, and small images are enlarged. Build into another folder for the "
                "new rules.",
                output,
            )  # fmt: skip
    if flip and rank == 0:
        logger.warning("`flip`: %s", MIRRORED)

    if buckets == "given":
        rungs = []
    elif isinstance(buckets, str):
        made = ladder(resolution, bucket_step, buckets=buckets, max_aspect_ratio=max_aspect_ratio)
        rungs = made[: 1 if enlarge else None]
    else:
        rungs = [list(buckets)]
    tally = Tally()
    if records is None:
        records, tally = find_records(
            input_dir, caption_column=caption_column, split=split, leave_out=output, source_dir=source_dir,
            source_column=source_column, row_filter=RowFilter(row_filter) if row_filter else None,
        )  # fmt: skip
    edit = next((record for record in records if record.sources), None)
    if edit is not None and (reason := _no_edits(sources, layout)):
        raise SciflowError(f"`input_dir` is {str(input_dir)!r}, where {edit.name} has a reference image, {reason}")
    if sources is not None and sources.text:
        if embeds == "none":
            raise SciflowError(
                "`embeds` is none, but the text encoder of this family also reads the reference images: "
                "text is not encoded in training. Store it."
            )
        facts["text_reads_sources"] = True
    skips = Skips(strict, first_rank=rank == 0)
    for name, reason in (tally.skipped | tally.missing).items():
        skips.on_every_rank(name, reason)
    kind = STAGING[payload]
    found = find_jobs(
        records, rungs, resolution=resolution, crops=crops, flip=flip, with_caption=kind.with_text,
        skip=skips.on_every_rank, remark=tally.remark, by_length=rules == 1, sources=sources,
        compute_masks=edit_masks == "computed", bucket_step=bucket_step, fit=fit,
        bucket_columns=find_bucket_columns(records) if buckets == "given" else (),
    )  # fmt: skip
    jobs = by_bucket(found, batch_size)
    if not jobs:
        raise SciflowError(
            f"`input_dir` is {str(input_dir)!r}: none of its images can be read. First: {skips.first()}."
        )
    if plan is not None:
        if count_tokens is not None and rank == 0:
            _cut_note(jobs, count_tokens, {})
        _write_plan(plan, jobs, facts)
        if rank == 0:
            images = {job.name: job.record.name for job in jobs}
            tally.close(images, skips.found, {*images.values()})
            tally.measures |= source_measures(jobs) | shape_measures(jobs)
            logger.info("%s: what would become of it\n%s", input_dir, tally)
        return BuildReport(plan.folder, len(jobs), skipped=list(skips.found.items()), tally=tally, records=records)
    if rank:
        tally.remarks.clear()  # up to here all ranks have found the same, which the first tells
    staging = kind(output, jobs, facts | {"version": __version__}, layout, skips)
    report = BuildReport(output, tally=tally, records=records)
    notes: dict[str, Any] = {} if rules == 1 else {"rules": rules}
    builder = _Builder(
        staging, report, encode_images, encode_prompts, fixed, notes, batch_size, text_batch_size, samples_per_part,
        time_ids, rank, world_size, barrier, sources, have_regions(records, edit_masks == "computed"),
    )  # fmt: skip
    if count_tokens is not None and rank == 0:
        builder.notes |= _cut_note(jobs, count_tokens, noted or {})
    with locked(output) if rank == 0 else contextlib.nullcontext():
        builder.run()
    report.skipped = list(skips.found.items())
    if rank == 0:
        tally.close({job.name: job.record.name for job in jobs}, skips.found, builder.touched)
        tally.measures |= source_measures([job for job in jobs if job.name not in skips.found])
        tally.measures |= shape_measures([job for job in jobs if job.name not in skips.found])
        if cut := builder.notes.get(CUT):
            tally.measures |= {"captions that are cut": cut_text(cut)} if cut["count"] else {}
            tally.measures |= {"captions by their tokens": lengths_text(cut)} if cut["count"] else {}
        logger.info("%s: what became of it\n%s", input_dir, tally)
        if not report.samples:
            raise SciflowError(f"`input_dir` is {str(input_dir)!r}: no image could be used. First: {skips.first()}.")
        logger.info(
            "%s: %s (%d encoded now, %d before), %d skipped, %s.",
            output, counted(report.samples, "sample"), report.encoded, report.reused, len(report.skipped),
            readable_bytes(report.bytes),
        )  # fmt: skip
    return report


def _write_plan(plan: Plan, jobs: Sequence[Job], facts: Mapping[str, Any]) -> None:
    """The index that a cache of these jobs would have, as far as it is known without encoders."""
    text = {} if plan.text_shape is None else {"prompt_embeds_shape": list(plan.text_shape)}
    rows = [
        job.row()
        | {"latent_shape": list(plan.latent_shape(*job.bucket)), **text}
        | {"source_shapes": [list(plan.latent_shape(*source.view.size)) for source in job.sources]}
        for job in jobs
    ]
    if not any(job.sources for job in jobs):
        rows = [{name: value for name, value in row.items() if not name.startswith("source_")} for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    described = {**facts, "embeds": "bf16" if text else "none", "payload": {"layout": PLANNED}}
    with output_file(plan.folder / index_file("plan")) as handle:
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(described)}), handle)


def _holds_latents(output: Path) -> bool:
    """Whether a cache is there, or begun, that stores latents."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # `noted_settings` tells what is wrong
        return "latents" not in json.loads((output / BUILD_FILE).read_text())["settings"]
    return False


def _no_edits(sources: SourceRules | None, layout: Layout) -> str:
    """Why a cache cannot hold edits, for a message; "" if it can."""
    if sources is None:
        return (
            "but the family takes none. Choose a family that reads reference images, such as flux2_klein, or leave out "
            "their column."
        )
    if layout.latent_shape is not None:
        return "but `latents` is none: images that are encoded in training have none. Store the latents."
    return ""


def _lack(item: Shared) -> str:
    """Why a sample is left out for want of what it shares with others."""
    if isinstance(item, SourceView):
        return f"its source {item.name} cannot be used"
    return "its encoded prompt holds NaN or Inf"


def _cut_note(jobs: Sequence[Job], count_tokens: CountTokens, noted: Mapping[str, Any]) -> dict[str, Any]:
    """The note on captions that are cut, unless an earlier build has left it: {} if that is unknown."""
    captions = [(job.name, job.caption) for job in jobs if job.view.variant == job.record.part]
    digest = hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:16]
    found: dict[str, Any] | None = noted.get(CUT)
    if found is None or found["captions"] != digest or "lengths" not in found:
        found = find_cut(captions, count_tokens)
    if found is None:
        return {}
    warn_of_cut(found, len(captions))
    return {CUT: found | {"captions": digest}}


def _stacked(pixels: Sequence[np.ndarray]) -> torch.Tensor:
    """(B, 3, H, W) of B views; of one no copy."""
    return torch.from_numpy(np.stack(pixels) if len(pixels) > 1 else pixels[0][None])


@dataclass
class _Builder:
    """The work of one rank: its share of the batches is encoded, its blocks are completed; see `build_cache`."""

    staging: Staging
    report: BuildReport
    encode_images: _Encode
    encode_prompts: _Encode
    settings: Mapping[str, Any]
    notes: dict[str, Any]  # also kept in `BUILD_FILE`
    batch_size: int
    text_batch_size: int
    samples_per_part: int
    time_ids: bool
    rank: int
    world_size: int
    barrier: Callable[[], None]
    sources: SourceRules | None = None
    edit_masked: bool = False
    texts: dict[str, _Tensors] = field(default_factory=dict)  # of the last images
    source_latents: dict[str, torch.Tensor | str] = field(
        default_factory=dict
    )  # of the last images, if stored with them
    image_bytes: int = 0  # of the last one
    prompt_bytes: int = 0
    source_bytes: int = 0
    saved: Job | None = None  # the last one
    left: int = 0  # images to encode, on all ranks
    own: int | None = None  # images that this rank encodes; None before that is planned
    bar: "tqdm[Any] | None" = None
    touched: set[str] = field(default_factory=set)  # images that some rank encodes in this run

    def __post_init__(self) -> None:
        self.output, layout = self.staging.output, self.staging.layout
        self.jobs, self.skip = self.staging.jobs, self.staging.skip
        self.behind = Behind(_LATE)
        self.dtype, self.with_embeds = layout.dtype, layout.embeds != "none"
        self.masked = "fit" in self.settings or any(job.record.mask is not None for job in self.jobs)

    def run(self) -> None:
        """Builds, together with the other ranks."""
        try:
            self._run()
        except KeyboardInterrupt:
            done, total = self.report.encoded + self.report.reused, len(self.jobs)
            logger.warning("Stopped with %d of %d images encoded. The same command continues from here.", done, total)
            raise
        finally:
            self.behind.close()
            if self.bar is not None:
                self.bar.close()

    def _run(self) -> None:
        self.staging.look()
        self.barrier()
        if self.rank == 0:
            self._begin()
        self.barrier()
        blocks = self.staging.plan(self._block_size())
        self.barrier()
        if self.rank == 0:
            self.staging.clear()

        turn = itertools.count()  # batches are dealt in turn, over all blocks: no rank has one more than another

        def share(batches: Iterable[list[T]]) -> list[list[T]]:
            return [batch for batch in batches if next(turn) % self.world_size == self.rank]

        mine = [share(in_batches(jobs, self.batch_size)) for jobs in blocks]
        self.left = sum(map(len, blocks)) + self.report.encoded
        self.own = sum(len(batch) for block in mine for batch in block)
        self.report.reused = len(self.jobs) - self.left
        self.touched |= {job.record.name for jobs in blocks for job in jobs}
        if not self.left:
            logger.info("All %d images are encoded already.", len(self.jobs))
        views = self._views([job for block in mine for batch in block for job in batch])
        for start in range(0, len(blocks), self.world_size):
            numbers = range(start, min(start + self.world_size, len(blocks)))
            own = start + self.rank
            try:
                for number in numbers:
                    for window in self._windows(mine[number]):
                        if self.staging.with_text:
                            self._encode_ahead([job for batch in window for job in batch])
                        for batch in window:
                            self._encode(list(itertools.islice(views, len(batch))))
                self.behind.finish()
                self.barrier()
                for number in numbers:
                    shared = self.staging.shared(number)
                    for some in share(self._text_batches(item for item in shared if isinstance(item, Prompt))):
                        self._encode_prompts(some)
                    views_of_sources = [item for item in shared if isinstance(item, SourceView)]
                    self._encode_sources(share(self._source_batches(views_of_sources)))
                self.behind.finish()
                self.barrier()
                self.staging.gather(numbers.start, numbers.stop)
                self.barrier()  # before any rank tidies up
            except BaseException:  # also Ctrl-C: what is encoded is kept
                views.close()
                self.behind.close()
                if own in numbers:
                    self.staging.salvage(own)
                raise
            if own in numbers:  # while the next ones are encoded
                self.behind.put(functools.partial(self._finish, own))
        views.close()  # else the garbage collector does, in any thread, which may hold a lock that this needs
        self.behind.finish()
        if self.rank:
            self._write_note()
        self.barrier()
        if self.rank == 0:
            self._read_notes()
            self.report.samples, self.report.bytes = self.staging.close()
            if (self.output / FOLDER).exists():
                shutil.rmtree(self.output / FOLDER)
        self.barrier()

    def _finish(self, number: int) -> list[Callable[[], None]]:
        """In the thread that saves; returns what is left to do."""
        return [functools.partial(self.skip, job.name, _lack(item)) for job, item in self.staging.finish(number)]

    def _begin(self) -> None:
        """Work of one rank before the others start."""
        known = self._sizes()
        self._write_settings(known)
        remove_temporaries(self.output)
        self.staging.clean()
        file = self.output / EMPTY_PROMPT_FILE
        if self.with_embeds and not file.is_file() and not self._text_reads_sources:  # for caption dropout
            write_npz(file, text_rows(self.encode_prompts([""]))[0], self.dtype)
        if known or self.staging.with_text:
            return
        for batch in in_batches(self.jobs, self.batch_size):  # the first sample tells how many make a block
            self._encode(list(self._views(batch)))
            self.behind.finish()
            if self.saved is not None:
                if self.with_embeds:
                    self._encode_prompts([self.saved.prompt])
                    self.behind.finish()
                sizes = {"sample_bytes": self.image_bytes + self.prompt_bytes, "prompt_bytes": self.prompt_bytes}
                if self.saved.sources:
                    self._encode_sources([[source] for source in self.saved.sources])
                    self.behind.finish()
                    sizes["source_bytes"] = self.source_bytes
                    sizes["sample_bytes"] += self.source_bytes * len(self.saved.sources)
                self._write_settings(sizes)
                return

    def _sizes(self) -> dict[str, int]:
        """Bytes of a sample, of its prompt and of a source, once they are known."""
        file = self.output / BUILD_FILE
        noted = json.loads(file.read_text()) if file.is_file() else {}
        return {name: noted[name] for name in ("sample_bytes", "prompt_bytes", "source_bytes") if name in noted}

    def _write_settings(self, sizes: Mapping[str, int]) -> None:
        # Kept, so that the blocks of a build are as large before as after a kill.
        write_settings(self.output / BUILD_FILE, self.settings, version=__version__, **self.notes, **sizes)

    def _block_size(self) -> int:
        size = self._sizes().get("sample_bytes")
        return max(1, min(self.samples_per_part, BLOCK_BYTES // size)) if size else self.samples_per_part

    def _views(self, jobs: Sequence[Job]) -> Generator[Pixels, None, None]:
        """The pixels of `jobs` in their order, decoded ahead by threads: views of one image that follow together."""
        images = [list(group) for _, group in itertools.groupby(jobs, key=lambda job: job.record.name)]
        ahead = max(2, (2 * self.batch_size + THREADS) * len(images) // max(1, len(jobs)))
        with contextlib.closing(in_order(read_views, images, ahead=ahead)) as found:
            for _, views in found:
                yield from views

    def _windows(self, batches: Sequence[list[Job]]) -> Iterator[list[list[Job]]]:
        """Neighbouring batches whose text is encoded together; only as many as memory should hold the text of."""
        size = max(1, _TEXT_BATCHES * self.text_batch_size // self.batch_size)
        yield from (list(batches[i : i + size]) for i in range(0, len(batches), size))

    def _text_batches(self, prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
        """Texts of about one length together, the longest first: if there is too little memory, it is at the start."""
        ordered = sorted(prompts, key=lambda prompt: len(prompt.caption), reverse=True)
        yield from (ordered[i : i + self.text_batch_size] for i in range(0, len(ordered), self.text_batch_size))

    def _source_batches(self, sources: Iterable[SourceView]) -> Iterator[list[SourceView]]:
        """Sources of one size together."""
        by_size: dict[tuple[int, int], list[SourceView]] = {}
        for source in sources:
            by_size.setdefault(source.view.size, []).append(source)
        for same in by_size.values():
            yield from (same[i : i + self.batch_size] for i in range(0, len(same), self.batch_size))

    def _encode(self, batch: Sequence[Pixels]) -> None:
        """Encodes the images of a batch, and saves those that can be used."""
        good = []
        for view in batch:
            if view.reason:
                self.skip(view.job.name, view.reason)
                continue
            if view.not_numbers:
                self.report.tally.remark("images with pixels that are NaN (white) or infinite", view.job.record.name)
            good.append(view)
            self.touched.add(view.job.record.name)
        if good:
            stored = self.staging.layout.latent_shape is None
            images = self.encode_images(_stacked([view.pixels for view in good])) if stored else {}
            shown = [(view.job, view.mask, view.edit_mask) for view in good]
            self.behind.put(functools.partial(self._save, shown, images, self.texts, self.source_latents))

    def _save(
        self,
        shown: Sequence[tuple[Job, Image.Image, Image.Image]],
        images: _Tensors,
        texts: Mapping[str, _Tensors],
        sources: Mapping[str, torch.Tensor | str],
    ) -> list[Callable[[], None]]:
        """A batch, in the thread that saves; returns what is left to do."""
        samples = ({name: value[i] for name, value in images.items()} for i in range(len(shown)))
        return [self._save_one(*view, sample, texts, sources) for view, sample in zip(shown, samples, strict=True)]

    def _save_one(
        self,
        job: Job,
        mask: Image.Image,
        edit_mask: Image.Image,
        sample: _Tensors,
        texts: Mapping[str, _Tensors],
        sources: Mapping[str, torch.Tensor | str],
    ) -> Callable[[], None]:
        if "latents" in sample:
            height, width = sample["latents"].shape[-2:]
            if self.masked:
                sample["loss_mask"] = torch.from_numpy(average_mask(mask, (height, width)))
            if self.edit_masked:
                sample["edit_mask"] = torch.from_numpy(largest_mask(edit_mask, (height, width)))
        if self.time_ids and "latents" in sample:
            sample["time_ids"] = torch.tensor([*job.view.original, *job.view.crop, *job.view.size])
        if self.staging.with_text:
            for number, source in enumerate(job.sources):
                latents = sources[source.id]
                if isinstance(latents, str):
                    return functools.partial(self.skip, job.name, f"its source {source.name}: {latents}")
                sample[source_name(number)] = latents
            sample |= texts[job.text_key]
        if bad := self._not_finite(sample):
            return lambda: self.skip(job.name, f"its encoded {bad} holds NaN or Inf in {self.settings['dtype']}")
        size = self.staging.save(job, sample)

        def saved() -> None:
            self.image_bytes, self.saved = size, job
            self.report.encoded += 1
            self._advance()

        return saved

    def _encode_ahead(self, jobs: Sequence[Job]) -> None:
        """Encodes what is stored with the coming images; texts and sources of the last ones may be among it."""
        prompts = {job.text_key: job.prompt for job in jobs}
        self.texts = {key: row for key, row in self.texts.items() if key in prompts}
        for some in self._text_batches(prompt for key, prompt in prompts.items() if key not in self.texts):
            for prompt, row in zip(some, self._texts(some), strict=True):
                self.texts[prompt.key] = {name: value.cpu() for name, value in row.items()}
        sources = {source.id: source for job in jobs for source in job.sources}
        self.source_latents = {key: latents for key, latents in self.source_latents.items() if key in sources}
        new = [source for key, source in sources.items() if key not in self.source_latents]
        for source, latents in self._encoded_sources(list(self._source_batches(new))):
            self.source_latents[source.id] = latents

    def _texts(self, prompts: Sequence[Prompt]) -> list[_Tensors]:
        """Encodes prompts one by one; {} where the sources cannot be read, which is told with their latents."""
        if not self._text_reads_sources:
            return text_rows(self.encode_prompts([prompt.caption for prompt in prompts]))
        shown: dict[int, list[Image.Image]] = {}
        for i, prompt in enumerate(prompts):
            with contextlib.suppress(Exception):  # PIL lets through whatever its decoders raise
                shown[i] = [source.window() for source in prompt.sources]
        captions = [prompts[i].caption for i in shown]
        rows = text_rows(self.encode_prompts(captions, sources=list(shown.values()))) if shown else []
        found = dict(zip(shown, rows, strict=True))
        return [found.get(i, {}) for i in range(len(prompts))]

    @property
    def _text_reads_sources(self) -> bool:
        return self.sources is not None and self.sources.text

    def _encoded_sources(
        self, batches: Sequence[Sequence[SourceView]]
    ) -> Generator[tuple[SourceView, torch.Tensor | str], None, None]:
        """The latents (C, h, w) of sources, of one size in each batch; a text says why there are none."""
        ahead = 2 * self.batch_size + THREADS
        odd: set[str] = set()
        read_one = functools.partial(read_source, odd=odd.add)
        with contextlib.closing(in_order(read_one, itertools.chain(*batches), ahead=ahead)) as pixels:
            for batch in batches:
                read = list(itertools.islice(pixels, len(batch)))
                good = [found for _, found in read if not isinstance(found, str)]
                encoded = iter(self.sources.encode(_stacked(good)) if self.sources and good else ())
                for source, found in read:
                    latents = found if isinstance(found, str) else next(encoded)
                    if not isinstance(latents, str) and self._not_finite({"latents": latents}):
                        latents = f"its latents hold NaN or Inf in {self.settings['dtype']}"
                    yield source, latents
        for name in sorted(odd):
            self.report.tally.remark("sources with pixels that are NaN (white) or infinite", name)

    def _encode_sources(self, batches: Sequence[Sequence[SourceView]]) -> None:
        """Encodes and saves sources that are stored on their own."""
        with contextlib.closing(self._encoded_sources(batches)) as encoded:
            for source, latents in encoded:
                if isinstance(latents, str):
                    if self.skip.strict:
                        self.skip(source.record.sample, f"its source {source.name}: {latents}")
                    self.report.tally.remark("sources that cannot be used", f"{source.name} ({latents})")
                self.behind.put(functools.partial(self._save_source, source, latents))

    def _save_source(self, source: SourceView, latents: torch.Tensor | str) -> list[Callable[[], None]]:
        tensors = None if isinstance(latents, str) else {source_name(0): latents}
        self.source_bytes = self.staging.save_shared(source, tensors)
        return []

    def _encode_prompts(self, prompts: list[Prompt]) -> None:
        """Encodes and saves prompts that are stored on their own."""
        rows = self._texts(prompts)
        self.behind.put(lambda: list(map(self._save_prompt, prompts, rows)))

    def _save_prompt(self, prompt: Prompt, text: _Tensors) -> Callable[[], None]:
        bad = self._not_finite(text) if text else "text"
        size = 0 if bad and self.skip.strict else self.staging.save_shared(prompt, None if bad else text)

        def saved() -> None:
            self.prompt_bytes = size
            if bad and self.skip.strict:
                self.skip(f"The prompt {prompt.caption!r}", f"its encoded {bad} holds NaN or Inf")

        return saved

    def _not_finite(self, sample: _Tensors) -> str:
        """Names of the tensors with values that are NaN or infinite once they are stored; the ends of both tell."""
        ends = {n: torch.stack(value.to(self.dtype).aminmax()) for n, value in sample.items() if value.numel()}
        return " and ".join(n for n, found in ends.items() if not found.isfinite().all())

    def _advance(self) -> None:
        if self.own is None:  # nothing is planned yet
            return
        if self.bar is None:  # the first sample tells the size of all
            prompts = sum(map(len, self.staging.new_prompts))
            sizes, sources = self._sizes(), {source.id for job in self.jobs for source in job.sources}
            size = self.image_bytes * self.left + sizes.get("prompt_bytes", 0) * prompts
            size += sizes.get("source_bytes", 0) * len(sources)
            free = shutil.disk_usage(self.output).free
            need, room = readable_bytes(size), readable_bytes(free)
            images = counted(len(self.jobs), "image")
            buckets = counted(len({job.bucket for job in self.jobs}), "bucket")
            logger.info("%s in %s, %d to encode: about %s (%s free).", images, buckets, self.left, need, room)
            if size - self.image_bytes > free:
                text = "The cache needs %s, but %s has %s free. Free more space; finished samples are kept."
                logger.warning(text, need, self.output, room)
            self.bar = tqdm(total=self.own, unit="image", desc="Encoding", disable=self.rank > 0)
        self.bar.update()

    def _note(self, rank: int) -> Path:
        return self.output / FOLDER / f"rank{rank}.json"

    def _write_note(self) -> None:
        text = json.dumps([self.report.encoded, self.skip.found, self.report.tally.remarks])
        with output_file(self._note(self.rank)) as file:
            file.write(text.encode())

    def _read_notes(self) -> None:
        """Adds what the other ranks did."""
        for rank in range(1, self.world_size):
            encoded, skipped, remarks = json.loads(self._note(rank).read_text())
            self.report.encoded += encoded
            self.skip.found |= skipped
            for what, names in remarks.items():
                for name in names:
                    self.report.tally.remark(what, name)
