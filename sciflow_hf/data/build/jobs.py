"""The work of a build: the views of each image with their buckets, in batches that are dealt to the ranks."""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, cast

from PIL import Image

from ...errors import SciflowError, counted
from ..batches.sizes import fitting_bucket
from .ahead import in_order
from .references import SourceRules, SourceView, source_view
from .sources.pixels import has_more_frames, oriented_size, unreadable
from .sources.record import Record, Stored
from .tally import EDITS, Measure
from .views import View, variants, view_of

_Bucket = tuple[int, int]
_ROUNDING = 1e-6  # of the box of a view
_AT_ONCE = 16
_SOURCES = 4096  # whose facts are kept
_BUCKET_COLUMNS = (("bucket_h", "bucket_w"), ("height", "width"))  # the latter in older tables
_CUT_OFF = 0.1  # share of an image's area from which on it is told


def text_key(caption: str, source_ids: Iterable[str] = ()) -> str:
    """Names a text that follows from a caption, and from sources where the text encoder reads them."""
    return "\0".join([caption, *source_ids])


@dataclass(frozen=True)
class Prompt:
    """A text to encode.

    Attributes:
        caption: its words.
        sources: that the text encoder reads as well.
    """

    caption: str
    sources: tuple[SourceView, ...] = ()

    @property
    def key(self) -> str:
        """Equal where the embedding is: the caption, with the ids of the sources where there are some."""
        return text_key(self.caption, [source.id for source in self.sources])


@dataclass(frozen=True)
class Job:
    """One view of one image, which becomes one row.

    Attributes:
        record: the image.
        view: what is shown of it, and its bucket.
        id: 16 hex digits over all that its stored arrays depend on.
        sources: what is shown of its reference images.
        text_reads_sources: whether its text depends on them.
        computes_mask: whether the changed region is what differs between the image and its first source.
    """

    record: Record
    view: View
    id: str
    sources: tuple[SourceView, ...] = ()
    text_reads_sources: bool = False
    computes_mask: bool = False

    @property
    def caption(self) -> str:
        return self.record.caption

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.caption, self.sources if self.text_reads_sources else ())

    @property
    def text_key(self) -> str:
        return self.prompt.key

    @property
    def bucket(self) -> _Bucket:
        return self.view.size

    @property
    def name(self) -> str:
        """The image and its variant, as in a cache's row ids."""
        return f"{self.record.name}#{self.view.variant}" if self.view.variant else self.record.name

    def row(self) -> dict[str, Any]:
        """The columns of an index that do not depend on the layout."""
        height, width = self.bucket
        return self.record.columns | {
            "image_path": self.record.name,
            "caption": self.caption,
            "variant": self.view.variant,
            "bucket_w": width,
            "bucket_h": height,
            "aspect_ratio": f"{width / height:.2f}",
            "original_h": self.view.original[0],
            "original_w": self.view.original[1],
            "crop_top": self.view.crop[0],
            "crop_left": self.view.crop[1],
            "source_images": [source.name for source in self.sources],
            "source_ids": [source.id for source in self.sources],
            "source_sizes": [list(source.view.size) for source in self.sources],
        }


@dataclass(frozen=True)
class _Seen:
    """Facts of an image: (height, width), whether there are more frames, and what stands for its bytes."""

    size: tuple[int, int]
    more_frames: bool
    content: str | int


@dataclass(frozen=True)
class _SeenRow(_Seen):
    """The same of a record, with its sources and what stands for the bytes of its masks."""

    mask: str | int
    sources: tuple[_Seen, ...]
    edit_mask: str


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _seen(file: Stored, by_length: bool = False) -> _Seen | str:
    """Reads an image; a text says why it cannot be used."""
    try:
        data = file.read()
        with Image.open(BytesIO(data)) as image:
            size, more_frames = oriented_size(image), has_more_frames(image)
    except Exception as error:  # PIL lets through whatever its decoders raise; the image is named
        return unreadable(error)
    return _Seen(size, more_frames, len(data) if by_length else _digest(data))


def _look(record: Record, by_length: bool, seen_source: Callable[[Stored], _Seen | str]) -> _SeenRow | str:
    """Reads the files of a record; a text says why it cannot be used."""
    image = _seen(record.image, by_length)
    if isinstance(image, str):
        return image
    sources = []
    for name, file in zip(record.source_names, record.sources, strict=True):
        source = seen_source(file)
        if isinstance(source, str):
            return f"its source {name}: {source}"
        sources.append(source)
    mask, region = _bytes(record.mask), record.edit_mask
    return _SeenRow(
        image.size,
        image.more_frames,
        image.content,
        len(mask) if by_length else _digest(mask),
        tuple(sources),
        json.dumps(region) if isinstance(region, tuple) else _digest(_bytes(region)),
    )


def _bytes(mask: Stored | None) -> bytes:
    try:
        return mask.read() if mask else b""
    except OSError:  # named when it is opened for its pixels
        return b""


def _looked(records: Sequence[Record], by_length: bool) -> Iterator[tuple[Record, _SeenRow | str]]:
    """Each record with its `_look`, by threads, several in one go: handing one over takes as long as the look."""
    seen_source = functools.lru_cache(_SOURCES)(_seen)  # rows may share them

    def look(some: Sequence[Record]) -> list[_SeenRow | str]:
        return [_look(record, by_length, seen_source) for record in some]

    for some, seen in in_order(look, [records[i : i + _AT_ONCE] for i in range(0, len(records), _AT_ONCE)]):
        yield from zip(some, seen, strict=True)


def find_jobs(
    records: Sequence[Record],
    rungs: Sequence[Sequence[_Bucket]],
    *,
    resolution: int,
    crops: int,
    flip: bool,
    with_caption: bool,
    skip: Callable[[str, str], None],
    remark: Callable[[str, str], None] = lambda what, name: None,
    by_length: bool = False,
    sources: SourceRules | None = None,
    compute_masks: bool = False,
    bucket_columns: Sequence[str] = (),
    bucket_step: int = 1,
    fit: str = "cut",
) -> Iterator[Job]:
    """The views of each image, of which the header is decoded; all its bytes are read for the ids.

    Args:
        records: the images.
        rungs: buckets, (height, width) in pixels, to choose from as `fitting_bucket` does.
        resolution: that the buckets were made for.
        crops: windows of each image in addition to the complete one.
        flip: add the mirror image of each view.
        with_caption: whether a job's arrays depend on the caption.
        skip: called with name and reason for an image that cannot be read.
        remark: called with what is to be said of an image, and its name.
        by_length: ids as in earlier versions: by the length of a file instead of its content, whatever the bucket.
        sources: how a family takes sources; needed where records have some.
        compute_masks: of edits without a changed region, compute it.
        bucket_columns: with the height and width of each row's bucket, instead of `rungs`.
        bucket_step: of which these must be multiples.
        fit: see `view_of`.
    """
    masked = any(record.mask is not None for record in records)
    edit_masked = have_regions(records, compute_masks)
    last = None
    bucket_of = functools.cache(lambda height, width: fitting_bucket(height, width, rungs, fit))
    for record, seen in _looked(records, by_length):
        if isinstance(seen, str):
            skip(record.sample if record.sources else record.name, seen)
            continue
        bucket = _given_bucket(record, bucket_columns, bucket_step) if bucket_columns else bucket_of(*seen.size)
        if isinstance(bucket, str):
            skip(record.sample, bucket)
            continue
        if sources is not None and (reason := _unusable(record, seen, bucket, sources)):
            skip(record.sample, reason)
            continue
        if record.name != last and seen.more_frames:
            remark("images with several frames or pages, of which the first is taken", record.name)
        last, original = record.name, seen.size
        for name, source in zip(record.source_names, seen.sources, strict=True):
            if source.more_frames:
                remark("sources with several frames or pages, of which the first is taken", name)
        content: list[Any] = [record.name, record.caption if with_caption else None, resolution, seen.content]
        content += [] if by_length else [bucket]
        content += ["pad"] if fit == "pad" else []
        if masked:
            content += ["mask", seen.mask, record.mask is not None]
        computes = bool(compute_masks and seen.sources and record.edit_mask is None)
        if computes and seen.sources[0].size != original:
            computes = False
            remark("edits whose changed region cannot be computed: their first source has another size", record.name)
        if edit_masked:
            content += ["edit_mask", seen.edit_mask, record.edit_mask is not None, computes]
        for variant in variants(crops, flip, record.part):
            view = view_of(variant, record.name, original, bucket, fit)
            shown = [
                source_view(record, number, f"{source.content}", source.size, view, cast(SourceRules, sources))
                for number, source in enumerate(seen.sources)
            ]
            full = [*content, "sources", *(source.id for source in shown)] if shown else content
            text = json.dumps([*full, variant] if variant else full)
            reads = sources is not None and sources.text
            yield Job(record, view, _digest(text.encode())[:16], tuple(shown), reads, computes)


def find_bucket_columns(records: Iterable[Record]) -> tuple[str, str]:
    """The columns with the height and width of the buckets: `bucket_h`, `bucket_w`, or those of older tables.

    Raises:
        SciflowError: no record has them.
    """
    there = {name for record in records for name in record.columns}
    for names in _BUCKET_COLUMNS:
        if there.issuperset(names):
            return names
    raise SciflowError(
        "`buckets` given: the rows of `input_dir` have no columns `bucket_w` and `bucket_h` (or `width` and `height`), "
        f"but {', '.join(map(repr, sorted(there))) or 'none'}. Leave it out for buckets by `--resolution`."
    )


def _given_bucket(record: Record, columns: Sequence[str], step: int) -> _Bucket | str:
    """Height and width that a record names for itself; a text says why they cannot be used."""
    sides = []
    for name in columns:
        value = record.columns.get(name)
        try:
            side = float(0 if value is None else value)  # a text in CSV; a float where pandas has seen gaps
        except (TypeError, ValueError):
            side = 0.0
        if not side > 0 or side % step:  # NaN and infinity too
            return f"its `{name}` is {value!r:.40}, but must be a positive multiple of {step} pixels"
        sides.append(int(side))
    return sides[0], sides[1]


def have_regions(records: Iterable[Record], compute: bool) -> bool:
    """Whether the changed region of some edit is given or asked for, so that all samples have one."""
    return any(record.sources and (compute or record.edit_mask is not None) for record in records)


def _unusable(record: Record, seen: _SeenRow, bucket: _Bucket, rules: SourceRules) -> str:
    """Why the sources or the changed region of a record cannot be used; "" if they can."""
    if len(seen.sources) > rules.most:
        return f"it has {len(seen.sources)} sources, but the family takes at most {rules.most}"
    for name, source in zip(record.source_names, seen.sources, strict=True):
        if reason := rules.check(*source.size):
            return f"its source {name}: {reason}"
        if source.size == seen.size and (reason := rules.check(*bucket)):
            return f"its source {name}, as large as the image's bucket (raise `--resolution`): {reason}"
    height, width = seen.size
    for box in record.edit_mask if isinstance(record.edit_mask, tuple) else ():
        if not (box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height):
            return f"the box {list(box)} of its changed region lies outside the image of {height} x {width} (h x w)"
    return ""


def shape_measures(jobs: Iterable[Job]) -> dict[str, str]:
    """Lines for the table of a build: complete images that are enlarged, lose much at their edges, or are padded."""
    enlarged, cut, padded = Measure(), Measure(), Measure()
    for job in jobs:
        if job.view.variant == job.record.part:
            enlarged.add(job.record.name, job.view.enlarged, 1 + _ROUNDING)
            cut.add(job.record.name, job.view.cut_off, _CUT_OFF)
            padded.add(job.record.name, job.view.padded, 0)
    found = {
        "images that are enlarged": enlarged.text("at most {:.2f} times"),
        f"images that lose more than {_CUT_OFF:.0%} of their area at the edges": cut.text("at most {:.0%}"),
        "images that are padded": padded.text("at most {:.0%} of the bucket"),
    }
    return {what: text for what, text in found.items() if text}


def source_measures(jobs: Sequence[Job]) -> dict[str, str]:
    """The line on edits in the table of a build; {} where there are none."""
    numbers = sorted(len(job.sources) for job in jobs if job.sources)
    if not numbers:
        return {}
    most = f"{numbers[0]} to {numbers[-1]} sources" if numbers[-1] > numbers[0] else counted(numbers[0], "source")
    distinct = len({source.id for job in jobs for source in job.sources})
    return {EDITS: f"{len(numbers)} of {counted(len(jobs), 'sample')}, with {most} each; {distinct} distinct"}


def by_bucket(jobs: Iterator[Job], batch_size: int) -> list[Job]:
    """The jobs in about their order, but with `batch_size` of one bucket after each other."""
    waiting: dict[_Bucket, list[Job]] = {}
    ordered: list[Job] = []
    for job in jobs:
        queue = waiting.setdefault(job.bucket, [])
        queue.append(job)
        if len(queue) == batch_size:
            ordered += queue
            queue.clear()
    return ordered + [job for queue in waiting.values() for job in queue]


def in_batches(jobs: Sequence[Job], batch_size: int) -> Iterator[list[Job]]:
    """Neighbours of one bucket, at most `batch_size` together."""
    for _, group in itertools.groupby(jobs, key=lambda job: job.bucket):
        same = list(group)
        yield from (same[i : i + batch_size] for i in range(0, len(same), batch_size))
