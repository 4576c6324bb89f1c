"""Build a cache: every captioned image is encoded once, whatever happens in between."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from sciflow_hf import __version__
from sciflow_hf.errors import CacheError, SciflowError

from .buckets import aspect_ratio_buckets, nearest_bucket
from .cache import read_payload
from .index import EMPTY_PROMPT_FILE
from .sources import Record, find_records, fit_pixels, oriented_size, to_rgb
from .writing import (
    SETTINGS_FILE,
    check_output,
    index_schema,
    readable_bytes,
    write_index,
    write_payload,
    write_whole,
)

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PART = re.compile(r"data_rank0_part(\d{5,})\.parquet")
_TEMPORARY = re.compile(r"\..*\.tmp")
_Encode = Callable[[Any], dict[str, torch.Tensor]]


@dataclass
class BuildReport:
    """What a build did.

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


@dataclass(frozen=True)
class _Job:
    """One image with the bucket it goes to and the payload it becomes."""

    record: Record
    bucket: tuple[int, int]
    id: str
    file: str  # relative to the cache


def build_cache(
    input_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    encode_images: _Encode,
    encode_prompts: _Encode,
    settings: Mapping[str, Any],
    bucket_step: int,
    resolution: int = 1024,
    caption_column: str = "caption",
    batch_size: int = 1,
    strict: bool = False,
    dtype: str = "bf16",
    samples_per_part: int = 500,
) -> BuildReport:
    """Encode captioned images into a cache, or go on with one that was interrupted.

    Each sample becomes a file of its own, which appears whole or not at all, so that after a kill nothing
    finished is encoded again. The index follows from the input alone: after images were added or captions
    changed, the same call encodes what is new and writes the index anew.

    Args:
        input_dir: folder of images with captions, folder of `datasets.save_to_disk`, parquet files, or a Hub
            data set.
        output_dir: the cache: `data_rank0_part00000.parquet`, ... beside
            `<paper_id or hash>/<id>_latents.npz`.
        encode_images: (B, 3, H, W) float32 in [-1, 1] -> `latents` (B, C, h, w) and extras.
        encode_prompts: list of B prompts -> `prompt_embeds` (B, L, D) and extras, as `text_ids` (B, L, n).
        settings: what the encoders' results depend on; kept with the cache, JSON-able.
        bucket_step: height and width of the encoded images are multiples of it (pixels).
        resolution: the buckets have about resolution**2 pixels.
        caption_column: column of the metadata with the captions.
        batch_size: images encoded at once.
        strict: an image that cannot be used is an error; otherwise it is named, skipped and counted.
        dtype: of the floating arrays: bf16 (as bits in uint16), fp16 or fp32.
        samples_per_part: rows of one index file.

    Raises:
        SciflowError: for an unusable input, an `output_dir` that was built with other settings, and with
            `strict` for the first image that cannot be used.
    """
    counts = {"batch_size": batch_size, "samples_per_part": samples_per_part, "bucket_step": bucket_step}
    for name, value in counts.items():
        if value < 1:
            raise SciflowError(f"`{name}` is {value}, but must be at least 1.")
    if dtype not in DTYPES:
        raise SciflowError(f"`dtype` is {dtype!r}, but must be one of {', '.join(DTYPES)}.")
    if resolution < bucket_step:
        raise SciflowError(f"`resolution` is {resolution}, but image sides are multiples of {bucket_step}.")
    output = Path(output_dir)
    facts = json.loads(json.dumps({**settings, "dtype": dtype, "resolution": resolution}))  # tuples become lists
    fixed = facts | {"bucket_step": bucket_step}
    check_output(output, fixed)

    # Steps of 1/16 of the resolution, as in SDXL (64 at 1024): few enough buckets for full batches.
    step = bucket_step * max(1, resolution // (16 * bucket_step))
    buckets = aspect_ratio_buckets(resolution, step)
    records, skipped = find_records(input_dir, caption_column=caption_column, leave_out=output)
    builder = _Builder(output, facts, encode_images, encode_prompts, batch_size, strict, BuildReport(output))
    for name, reason in skipped:
        builder.skip(name, reason)
    jobs = _in_batches(builder.plan(records, buckets), batch_size)
    if not jobs:
        raise SciflowError(
            f"`input_dir` is {str(input_dir)!r}: none of its images can be read. First: {builder.first_skip()}."
        )
    text = json.dumps({"settings": fixed, "version": __version__}, indent=2) + "\n"
    write_whole(output / SETTINGS_FILE, lambda file: file.write(text.encode()))
    builder.run([jobs[i : i + samples_per_part] for i in range(0, len(jobs), samples_per_part)])
    report = builder.report
    if not report.samples:
        raise SciflowError(f"`input_dir` is {str(input_dir)!r}: no image could be used. First: {builder.first_skip()}.")
    logger.info(
        "%s: %d samples (%d encoded now, %d before), %d skipped, %s.",
        output, report.samples, report.encoded, report.reused, len(report.skipped),
        readable_bytes(report.bytes),
    )  # fmt: skip
    return report


class _Builder:
    """State of one build."""

    def __init__(
        self,
        output: Path,
        facts: dict[str, Any],
        encode_images: _Encode,
        encode_prompts: _Encode,
        batch_size: int,
        strict: bool,
        report: BuildReport,
    ) -> None:
        self.output, self.facts, self.report = output, facts, report
        self.encode_images, self.encode_prompts = encode_images, encode_prompts
        self.batch_size, self.strict, self.dtype = batch_size, strict, DTYPES[facts["dtype"]]
        self.total = self.pending = 0
        self.num_buckets = 0
        self.bar: tqdm[Any] | None = None

    def skip(self, name: str, reason: str) -> None:
        if self.strict:
            raise SciflowError(f"{name}: {reason}. Mend or remove it, or leave out `--strict` to skip such images.")
        logger.warning("Skipped %s: %s.", name, reason)
        self.report.skipped.append((name, reason))

    def first_skip(self) -> str:
        return "{} ({})".format(*self.report.skipped[0])

    def plan(self, records: Sequence[Record], buckets: Sequence[tuple[int, int]]) -> Iterator[_Job]:
        """Finds the bucket of each image from its header."""
        for record in records:
            try:
                with record.open() as image:
                    bucket = nearest_bucket(*oriented_size(image), buckets)
            except Exception as error:  # PIL lets through whatever its decoders raise; the image is named
                self.skip(record.name, f"unreadable image ({_reason(error)})")
                continue
            text = json.dumps([record.name, record.caption, self.facts["resolution"], record.num_bytes])
            digest = hashlib.sha256(text.encode()).hexdigest()[:16]
            paper = re.sub(r"[^\w.-]+", "_", str(record.columns.get("paper_id") or "")).strip("._")[:80]
            yield _Job(record, bucket, digest, f"{paper or digest[:2]}/{digest}_latents.npz")

    def run(self, parts: Sequence[Sequence[_Job]]) -> None:
        """Encodes what is missing, and writes the index part by part."""
        jobs = [job for part in parts for job in part]
        schema = index_schema([job.record.columns for job in jobs], self.facts | {"version": __version__})
        known = self._clean(parts, schema)
        self.total = len(jobs)
        self.num_buckets = len({job.bucket for job in jobs})
        self.pending = sum(not (self.output / job.file).is_file() for job in jobs)
        self._save_empty_prompt()
        if not self.pending:
            logger.info("All %d images are encoded already.", self.total)
        try:
            for number, part in enumerate(parts):
                self._make_part(number, part, known, schema)
        except KeyboardInterrupt:
            done = self.report.encoded + self.report.reused
            logger.warning(
                "Stopped with %d of %d images encoded. The same command goes on from here.", done, self.total
            )
            raise
        finally:
            if self.bar is not None:
                self.bar.close()

    def _clean(self, parts: Sequence[Sequence[_Job]], schema: "pa.Schema") -> dict[str, dict[str, Any]]:
        """Removes what a kill or another input left; returns the rows of the old index by payload."""
        import pyarrow.parquet as pq

        known: dict[str, dict[str, Any]] = {}
        stale = []
        for parent, _, files in os.walk(self.output):
            for name in filter(_TEMPORARY.fullmatch, files):
                Path(parent, name).unlink(missing_ok=True)
        for file in sorted(self.output.glob("data_rank0_part*.parquet")):
            match = _PART.fullmatch(file.name)
            if match is None:
                continue
            table = pq.read_table(file)
            rows = {row["cache_path"]: row for row in table.to_pylist()}
            known |= rows
            number = int(match[1])
            planned = {job.file for job in parts[number]} if number < len(parts) else set()
            if not rows.keys() <= planned or not table.schema.equals(schema):
                stale.append(file)
        wanted = {job.file for part in parts for job in part}
        names = {job.record.name for part in parts for job in part}
        if known and not any(path in wanted or row.get("image_path") in names for path, row in known.items()):
            raise SciflowError(
                f"`output_dir` is {str(self.output)!r}, which holds a cache of other images ({len(known)} "
                "samples). Name another folder: `--dataset_dir` takes several caches."
            )
        if gone := len(known.keys() - wanted):
            logger.warning("%d samples leave the index: their images or captions are no longer in the input.", gone)
        for file in stale:
            file.unlink()
        return known

    def _make_part(
        self, number: int, jobs: Sequence[_Job], known: Mapping[str, Mapping[str, Any]], schema: "pa.Schema"
    ) -> None:
        rows: dict[str, dict[str, Any]] = {}
        missing = []
        for job in jobs:
            shapes = self._shapes_on_disk(job, known.get(job.file))
            if shapes is None:
                missing.append(job)
            else:
                rows[job.id] = _row(job, *shapes)
                self.report.reused += 1
        try:
            for batch in _runs(missing, self.batch_size):
                for job, sample in self._encode(batch):
                    write_payload(self.output / job.file, sample, self.dtype)
                    rows[job.id] = _row(job, sample["latents"].shape, sample["prompt_embeds"].shape)
                    self.report.encoded += 1
                    self._advance(job)
        finally:  # after Ctrl-C or an error, too, the index names what is there
            done = [job for job in jobs if job.id in rows]
            write_index(self.output / _part_name(number), [rows[job.id] for job in done], schema)
            self.report.samples += len(done)
            self.report.bytes += sum((self.output / job.file).stat().st_size for job in done)

    def _shapes_on_disk(self, job: _Job, row: Mapping[str, Any] | None) -> tuple[Sequence[int], Sequence[int]] | None:
        """Shapes of latents and embeddings of a finished sample; None if it has to be encoded."""
        file = self.output / job.file
        if not file.is_file():
            return None
        if row is not None:
            return row["latent_shape"], row["prompt_embeds_shape"]
        try:
            sample = read_payload(str(file), job.record.name, torch.float32)
        except CacheError as error:
            logger.warning("Encoded again: %s", error)
            return None
        return tuple(sample["latents"].shape), tuple(sample["prompt_embeds"].shape)

    def _encode(self, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, dict[str, torch.Tensor]]]:
        """Encodes images of one bucket; each distinct prompt once."""
        pixels, good = [], []
        for job in jobs:
            try:
                with job.record.open() as image:
                    pixels.append(fit_pixels(to_rgb(image), job.bucket))
                good.append(job)
            except Exception as error:  # as in `plan`
                self.skip(job.record.name, f"unreadable image ({_reason(error)})")
        if not good:
            return
        prompts = list(dict.fromkeys(job.record.caption for job in good))
        images = self.encode_images(torch.from_numpy(np.stack(pixels)))
        texts = self.encode_prompts(prompts)
        for i, job in enumerate(good):
            j = prompts.index(job.record.caption)
            sample = {name: value[i] for name, value in images.items()}
            sample |= {name: value[j] for name, value in texts.items()}
            bad = [name for name, value in sample.items() if not torch.isfinite(value.to(self.dtype)).all()]
            if bad:
                self.skip(
                    job.record.name,
                    f"its encoded {' and '.join(bad)} holds NaN or Inf in {self.facts['dtype']}",
                )
            else:
                yield job, sample

    def _save_empty_prompt(self) -> None:
        """The empty prompt's embedding, for caption dropout."""
        file = self.output / EMPTY_PROMPT_FILE
        if not file.is_file():
            write_payload(file, {k: v[0] for k, v in self.encode_prompts([""]).items()}, self.dtype)

    def _advance(self, job: _Job) -> None:
        if self.bar is None:  # the first sample tells the size of all
            size = (self.output / job.file).stat().st_size
            free = shutil.disk_usage(self.output).free
            need, room = readable_bytes(size * self.pending), readable_bytes(free)
            text = "%d images in %d buckets, %d to encode: about %s (%s free)."
            logger.info(text, self.total, self.num_buckets, self.pending, need, room)
            if size * (self.pending - 1) > free:
                text = "The cache needs %s, but %s has %s free. Make room; finished samples are kept."
                logger.warning(text, need, self.output, room)
            self.bar = tqdm(total=self.pending, unit="image", desc="Encoding")
        self.bar.update()


def _in_batches(jobs: Iterator[_Job], batch_size: int) -> list[_Job]:
    """The jobs in about their order, but with `batch_size` of one bucket after each other."""
    waiting: dict[tuple[int, int], list[_Job]] = {}
    ordered: list[_Job] = []
    for job in jobs:
        queue = waiting.setdefault(job.bucket, [])
        queue.append(job)
        if len(queue) == batch_size:
            ordered += queue
            queue.clear()
    return ordered + [job for queue in waiting.values() for job in queue]


def _runs(jobs: Sequence[_Job], batch_size: int) -> Iterator[list[_Job]]:
    """Neighbours of one bucket, at most `batch_size` together."""
    batch: list[_Job] = []
    for job in jobs:
        if batch and (job.bucket != batch[0].bucket or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _row(job: _Job, latent_shape: Sequence[int], prompt_embeds_shape: Sequence[int]) -> dict[str, Any]:
    height, width = job.bucket
    return job.record.columns | {
        "image_path": job.record.name,
        "caption": job.record.caption,
        "cache_path": job.file,
        "latent_shape": list(latent_shape),
        "prompt_embeds_shape": list(prompt_embeds_shape),
        "bucket_w": width,
        "bucket_h": height,
        "aspect_ratio": f"{width / height:.2f}",
    }


def _part_name(number: int) -> str:
    return f"data_rank0_part{number:05d}.parquet"


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
