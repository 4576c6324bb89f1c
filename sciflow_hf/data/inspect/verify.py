"""Verify a cache: every array of every row is there, unchanged, of the right shape and dtype, and finite."""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from ...diffusion.sources import source_name, source_names_in
from ...errors import CacheError, SciflowError
from .. import storage
from ..cache import MEMBER_COLUMNS, LatentCache
from ..layouts.base import ATTENTION_MASK, BROKEN, DTYPES, MASKS, Member, Reader, read_members
from ..layouts.npz import npz_problems

_STORED = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_ROWS_AT_ONCE = 1024
_LOCKS = 64


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        row: row of the cache; None for the cache itself.
        what: the row in words.
        file: payload that has to be made anew; "" where the index is wrong.
        text: what is wrong.
    """

    row: int | None
    what: str
    file: str
    text: str

    def __str__(self) -> str:
        return f"{self.what}: {self.text}" + (f" [{self.file}]" if self.file and self.file not in self.text else "")


@dataclass
class VerifyReport:
    """Findings of `verify_cache`.

    Attributes:
        rows: samples that were looked at.
        arrays: stored arrays; one that several rows share counts once.
        bytes: that these arrays have on disk.
        problems: in the order of the rows.
        warnings: what is odd but does no harm.
    """

    rows: int
    arrays: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def bad_rows(self) -> list[int]:
        """Rows with a problem, ascending."""
        return sorted({problem.row for problem in self.problems if problem.row is not None})

    @property
    def bad_files(self) -> list[str]:
        """Payload files to make anew."""
        return sorted({problem.file for problem in self.problems if problem.file})

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        facts = asdict(self) | {"clean": self.clean, "bad_rows": self.bad_rows, "bad_files": self.bad_files}
        return facts | {"problems": [asdict(problem) for problem in self.problems]}


def verify_cache(cache: LatentCache, *, threads: int = 2, progress: bool = True) -> VerifyReport:
    """Read and check all that a cache stores; a bad row never stops the scan.

    Of npz files every byte of every array is held against the zip's checksums, and local headers against the
    central directory; of shards and inline files against the checksums in the index. An array that several rows
    share is read once. Memory: a few arrays per thread, and about 100 bytes an array.

    Args:
        cache: the cache or a view of it.
        threads: rows checked at the same time.
        progress: show a bar.

    Raises:
        SciflowError: `threads` is less than 1.
        CacheError: the index itself cannot be read.
    """
    if threads < 1:
        raise SciflowError(f"`threads` is {threads}, but must be at least 1.")
    report = VerifyReport(rows=len(cache), problems=_empty_prompt_problems(cache), warnings=_unused_shards(cache))
    scan = _Scan(cache)
    wrong = _bucket_problems(cache)
    for row, text in (*repeated_rows(cache), *_source_problems(cache)):
        wrong.setdefault(row, []).append(text)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
    try:
        with tqdm(total=len(cache), unit="sample", desc="Verifying", disable=not progress) as bar:
            for start in range(0, len(cache), _ROWS_AT_ONCE):
                rows = range(start, min(start + _ROWS_AT_ONCE, len(cache)))
                for i, found in zip(rows, pool.map(scan.row, rows), strict=True):
                    found = [("", text) for text in wrong.get(i, [])] + found
                    what = cache.describe(i) if found else ""
                    report.problems += [Problem(i, what, file, text) for file, text in found]
                    bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    for (name, dtype), count in sorted(scan.odd_dtypes.items()):
        text = f"`dtype` is {cache.metadata['dtype']!r}, but `{name}` is stored as {dtype} in {count} rows"
        report.problems.append(Problem(None, "the metadata", "", text))
    report.arrays, report.bytes = scan.arrays, scan.bytes
    return report


class _Scan:
    """Checks rows, in any thread."""

    def __init__(self, cache: LatentCache) -> None:
        self.cache = cache
        self.arrays = self.bytes = 0
        self.odd_dtypes: Counter[tuple[str, str]] = Counter()
        self.counting = threading.Lock()
        self.seen: dict[int, str] = {}  # stored tensor -> its problem, or ""
        self.reading = [threading.Lock() for _ in range(_LOCKS)]  # none is read by two threads
        columns = {name: cache.column(name) for name in _checksum_columns(cache)}
        self.checksums = {n: c.fill_null(-1).to_numpy() for n, c in columns.items() if c is not None}

    def row(self, i: int) -> list[tuple[str, str]]:
        """(file, what is wrong) of row `i`."""
        try:
            return self._row(i)
        except Exception as error:  # any error of a library for a broken file: name the row, continue the scan
            text = str(error) if isinstance(error, CacheError) else f"{type(error).__name__}: {error}"
            return [(self.cache.payload_path(i), text.partition(f" of {self.cache.reader(i).file}: ")[2] or text)]

    def _row(self, i: int) -> list[tuple[str, str]]:
        members, reader = self.cache.members(i), self.cache.reader(i)
        main = next((member.file for member in members.values()), self.cache.payload_path(i))
        found = [(main, text) for text in (*_shape_problems(members), *reader.check_file(members))]
        for member in members.values():
            for stored in (member, member.scale):
                if stored is not None and (text := self._member(i, stored, reader)):
                    found.append((stored.file, text))
        expected = _STORED.get(self.cache.metadata.get("dtype", ""))
        floats = [m for m in members.values() if DTYPES[m.dtype].is_floating_point]
        odd = [(m.name, m.dtype) for m in floats if expected and m.dtype not in (expected, "F8_E4M3")]
        with self.counting:
            self.odd_dtypes.update(odd)
        return found

    def _member(self, i: int, member: Member, reader: Reader) -> str:
        """The fault of a stored tensor, or ""."""
        checksums = self.checksums.get(f"{member.name}_crc32")
        crc = -1 if checksums is None else int(checksums[i])
        # A source is the same in any place of a row.
        same = replace(member, name=source_name(0)) if source_names_in([member.name]) else member
        key = hash((same, crc))
        with self.reading[key % _LOCKS]:
            if key not in self.seen:
                self.seen[key] = self._look(member, crc, reader)
                with self.counting:
                    self.arrays, self.bytes = self.arrays + 1, self.bytes + member.nbytes
            return self.seen[key]

    def _look(self, member: Member, crc: int, reader: Reader) -> str:
        try:
            return reader.check(member, crc) or _value_problem(member)
        except FileNotFoundError:
            return f"`{member.name}`: its file is missing"
        except (CacheError, *BROKEN) as error:
            return f"`{member.name}` cannot be read ({error.__cause__ or error})"


def _checksum_columns(cache: LatentCache) -> list[str]:
    return sorted({f"{name}_crc32" for reader in cache.readers for name in reader.tensors})


def _value_problem(member: Member) -> str:
    """Decodes an array as a reader would, and looks at its values."""
    stored = DTYPES[member.dtype]
    dtype = stored if stored in (torch.float16, torch.bfloat16) else torch.float32
    values = read_members([member], dtype, f"`{member.name}`")[member.name]
    # The extremes tell (NaN is both), much faster than a look at every value.
    if values.is_floating_point() and values.numel() and not torch.stack(torch.aminmax(values)).isfinite().all():
        odd = values.numel() - int(torch.isfinite(values).sum())
        return f"`{member.name}` holds NaN or Inf: {odd} of {values.numel()} values"
    if member.name == ATTENTION_MASK and not ((values == 0) | (values == 1)).all():
        return f"`{ATTENTION_MASK}` holds other values than 0 and 1"
    if member.name == "latents_std" and (values < 0).any():
        return "`latents_std` holds negative values"
    return ""


def _shape_problems(members: Mapping[str, Member]) -> Iterator[str]:
    """Shapes and dtypes of one row that do not fit each other."""
    latents = members["latents"].shape if "latents" in members else ()
    for name, shape in {"latents_std": latents, **dict.fromkeys(MASKS, latents[1:])}.items():
        if name in members and members[name].shape != shape:
            yield f"`{name}` has shape {members[name].shape}, but must have {shape} to fit the latents"
    for name in MASKS:
        if name in members and members[name].dtype != "U8":
            yield f"`{name}` is {members[name].dtype}, but must be U8"
    for name in source_names_in(members) if latents else ():
        if members[name].shape[0] != latents[0]:
            yield f"`{name}` has {members[name].shape[0]} channels, the latents {latents[0]}"
    for name in {"prompt_embeds_mask", "txt_ids"} & members.keys() if "prompt_embeds" in members else ():
        if members[name].shape[:1] != members["prompt_embeds"].shape[:1]:
            yield f"`{name}` has shape {members[name].shape}, `prompt_embeds` {members['prompt_embeds'].shape}"


# -- files -----------------------------------------------------------------------------------------------------


def _unused_shards(cache: LatentCache) -> list[str]:
    """Shards next to those in use that no row refers to; empty if `cache` is a view of some rows."""
    if not cache.is_complete:
        return []
    used = {file for reader in cache.readers for file in reader.files()}
    folders = {storage.join(reader.root, "shards") for reader in cache.readers if reader.files()}
    there = [file for folder in sorted(folders) for file in storage.find_files(folder, ".safetensors")]
    return [f"No row refers to {file}." for file in there if file not in used]


def _empty_prompt_problems(cache: LatentCache) -> list[Problem]:
    file = cache.empty_prompt_file
    if file is None:
        return []
    texts = npz_problems(file)
    try:
        for name, values in (cache.empty_prompt or {}).items():
            if not torch.isfinite(values).all():
                texts.append(f"`{name}` holds NaN or Inf")
    except (CacheError, *BROKEN) as error:
        texts.append(str(error))
    return [Problem(None, "the empty prompt", file, text) for text in texts]


# -- the index -------------------------------------------------------------------------------------------------


def _bucket_problems(cache: LatentCache) -> dict[int, list[str]]:
    """Rows whose bucket, channels or width of text are not those of the others."""
    sizes, latents, texts = np.array(cache.buckets), cache.latent_shapes, cache.text_shapes
    found: dict[int, list[str]] = {}
    everywhere, with_text = np.arange(len(latents)), np.flatnonzero(texts[:, 0])
    of_bucket = "the bucket does not fit `latent_shape`: a latent is {} pixels, those of the other rows {}"
    columns = (
        (of_bucket, everywhere, sizes.reshape(-1, 2) / latents[:, 1:]),
        ("the latents have {} channels, those of the other rows {}", everywhere, latents[:, :1]),
        ("the text embeddings are {} wide, those of the other rows {}", with_text, texts[with_text, 1:]),
    )
    for text, rows, values in columns:
        kinds, kind, counts = np.unique(values, axis=0, return_inverse=True, return_counts=True)
        said = [" x ".join(f"{number:g}" for number in row) for row in kinds.tolist()]
        usual = int(counts.argmax()) if len(rows) else 0
        for row, k in zip(rows.tolist(), kind.reshape(-1).tolist(), strict=True):
            if k != usual:
                found.setdefault(row, []).append(text.format(said[k], said[usual]))
    return found


def _source_problems(cache: LatentCache) -> Iterator[tuple[int, str]]:
    """Rows whose columns of sources do not say as many as `source_shapes`, or sizes that do not fit those shapes."""
    shapes = cache.source_shapes
    per_latent = np.array(cache.buckets).reshape(-1, 2) / cache.latent_shapes[:, 1:]
    for name in ("source_images", "source_ids", "source_sizes"):
        column = cache.column(name)
        for row, values in enumerate([] if column is None else column.to_pylist()):
            values = values or []
            if len(values) != len(shapes[row]):
                yield row, f"column `{name}` names {len(values)} sources, `source_shapes` {len(shapes[row])}"
            elif name == "source_sizes" and values:
                pixels = np.array(values) / np.array(shapes[row])[:, 1:]
                for number in np.flatnonzero((pixels != per_latent[row]).any(axis=1)).tolist():
                    shape = shapes[row][number]
                    yield row, f"source {number} is of {values[number]} pixels, which does not fit its shape {shape}"


def repeated_rows(cache: LatentCache) -> Iterator[tuple[int, str]]:
    """Rows that are an earlier one once more: the same image and variant with the same payload."""
    names = ["image_path", "variant"]
    for columns, needed in ((MEMBER_COLUMNS, "cache_path"), (_checksum_columns(cache), "latents_crc32")):
        found = {name: cache.column(name) for name in dict.fromkeys((*names, *columns))}
        if found.get(needed) is None:
            continue
        frame = pa.table({name: column for name, column in found.items() if column is not None}).to_pandas()
        again = frame.duplicated() & frame[needed].notna()
        yield from ((i, "the same image and payload as an earlier row") for i in np.flatnonzero(again).tolist())
