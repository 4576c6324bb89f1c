"""Shared by the layouts: `Member`, a stored tensor; `Reader`, which finds those of a row; `Writer` of blocks."""

import contextlib
import json
import math
import re
import struct
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as types
import torch

from ...diffusion.sources import source_name, source_names_in
from ...errors import CacheError, SciflowError, first_line
from .. import storage
from ..writing import output_file
from . import CODECS, EMBEDS, PAYLOADS
from .codecs import PIECE, dequantise, pack, quantise, unpack

METADATA_KEY = b"sciflow_hf"
"""Schema metadata of an index file: encoder settings and `payload`, its facts beyond the columns."""
NO_LATENTS = "none"
"""Noted by a payload as `latents` if its rows hold none: images are encoded in training."""
MADE_COLUMNS = ("cache_path", "inline_row", "latent_shape", "prompt_embeds_shape", "source_shapes")
"""Columns that writers add to the rows of a block, except those of single tensors."""
TEXT_TENSORS = ("prompt_embeds", "prompt_embeds_scale", "pooled_prompt_embeds", "prompt_embeds_mask", "txt_ids")
"""Arrays that follow from the prompt alone."""
SHARED_TENSORS = (*TEXT_TENSORS, source_name(0))
"""Names under which shards store once what several rows have: text, and sources, whatever their number in a row."""
MASKS = ("loss_mask", "edit_mask")
"""Arrays (h, w) of bytes: 255 counts, or has changed. A sample without one is as one of 255 everywhere."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "BOOL": torch.bool,
}  # fmt: skip
"""Names of dtypes as in safetensors files."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
BROKEN = (
    OSError, EOFError, ValueError, OverflowError, MemoryError, KeyError, RuntimeError, SyntaxError,
    NotImplementedError, struct.error, zlib.error, zipfile.BadZipFile, pa.ArrowException,
)  # fmt: skip
"""Errors of the libraries below for a file that is not as it should be."""
numpy_reader = threading.Lock()
"""numpy reads the headers of arrays by `ast`, which in Python 3.11 may fail in two threads at once."""
VAE_H, ATTENTION_MASK = "vae_h", "attention_mask"
"""Arrays of SciForma's caches: mean and log-variance of the posterior, (2C, h, w), and a mask of the text, (L,)."""
LOG_VARIANCE = (-30.0, 20.0)
"""Log-variances are cut to this range, as by diffusers."""
REBUILD = "Run `sciflow-hf cache build` again"
CONVERT = "Run `sciflow-hf cache convert` or `cache build` again"
INT32 = 2**31 - 1
"""The largest side and shape: in memory they are int32."""
_CHUNK = 1 << 17  # values read at once: what fits into the processor's cache while their dtype is changed


@dataclass(frozen=True, slots=True)
class Member:
    """One stored tensor.

    Attributes:
        name: key in a batch.
        file: path or URL.
        offset, nbytes: of the stored bytes in the file.
        dtype: of the values, as in safetensors files ("BF16").
        shape: of the array.
        codec: "none"; "zstd" (see `codecs.pack`); "numpy" for an array that numpy has to decode.
        crc32: of the stored bytes, where the header of a file says so; else -1.
        scale: of an "F8_E4M3" array: float32, (shape[0],), one per token.
        log_variance: whether logarithms of variances are stored, which are read as standard deviations.
    """

    name: str
    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    codec: str = "none"
    scale: "Member | None" = None
    crc32: int = -1
    log_variance: bool = False

    def renamed(self, name: str) -> "Member":
        """The same array under another name."""
        return replace(self, name=name)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def target_dtype(member: Member, dtype: torch.dtype) -> torch.dtype:
    """The stored form of an array: floats `dtype`; truth values and masks stay; other whole numbers int64."""
    stored = DTYPES[member.dtype]
    if member.name == "txt_ids":
        return torch.int64
    if stored.is_floating_point:
        return dtype
    return stored if stored == torch.bool or member.name in MASKS else torch.int64


def read_member(member: Member, out: torch.Tensor, where: object) -> None:
    """Fills `out`, contiguous and of the member's shape, in the dtype of `out`.

    Raises:
        CacheError: naming `where` and the file, if the bytes are not there or do not decode.
    """
    stored = DTYPES[member.dtype]
    if member.log_variance:
        values = torch.empty(member.shape)
        read_member(replace(member, log_variance=False), values, where)
        out.copy_((values.clamp(*LOG_VARIANCE) * 0.5).exp())  # as diffusers' DiagonalGaussianDistribution
        return
    if member.name == "txt_ids" and stored.is_floating_point and not out.is_floating_point():
        ids = torch.empty(member.shape, dtype=torch.float64)
        read_member(member, ids, where)
        if not torch.isfinite(ids).all() or (ids != ids.round()).any():
            raise CacheError(
                f"{where}: `text_ids` in {member.file} holds values that are not whole numbers. {REBUILD}."
            )
        out.copy_(ids)
        return
    with explain(member.file, where, member.name):
        if tuple(out.shape) != member.shape:
            raise ValueError(f"shape {member.shape} does not fit into {tuple(out.shape)}")
        if member.codec == "numpy":
            out.copy_(_from_numpy(member))
            return
        plain = member.codec == "none"
        if plain and member.nbytes != out.numel() * stored.itemsize:
            raise ValueError(f"{member.nbytes} bytes cannot be {member.dtype} of shape {member.shape}")
        if plain and member.scale is None and stored != out.dtype:
            _read_converted(member, out)
            return
        values = out if stored == out.dtype else torch.empty(member.shape, dtype=stored)
        data = as_bytes(values) if plain else np.empty(member.nbytes, dtype=np.uint8)
        storage.reader(member.file)(member.offset, data)
        if not plain:
            unpack(data, as_bytes(values), stored.itemsize)
        if member.scale is not None:
            dequantise(values, read_members([member.scale], torch.float32, where)[member.scale.name], out)
        elif values is not out:
            for piece, target in zip(values.view(-1).split(PIECE), out.view(-1).split(PIECE), strict=True):
                _cast(piece, target)


def read_members(members: Iterable[Member], dtype: torch.dtype, where: object) -> dict[str, torch.Tensor]:
    """New tensors of some arrays, by name; floating ones in `dtype`. See `read_member`."""
    tensors = {}
    for member in members:
        tensors[member.name] = torch.empty(member.shape, dtype=target_dtype(member, dtype))
        read_member(member, tensors[member.name], where)
    return tensors


@contextlib.contextmanager
def explain(file: str, where: object, name: str = "") -> Iterator[None]:
    """Turns what goes wrong while a payload is read into a CacheError that names the row, the file and the member."""
    try:
        yield
    except CacheError:
        raise
    except FileNotFoundError as error:
        raise CacheError(
            f"{where}: the payload {file} (column `cache_path`) is missing. Say where the payloads are by "
            "`--payload_dir`, or run `sciflow-hf cache build` again."
        ) from error
    except BROKEN as error:
        reason, member = first_line(error), f", array `{name}`," if name else ""
        if "pickle" in reason or "Object arrays" in reason:
            raise CacheError(
                f"{where}: the payload {file}{member} holds pickled objects ({reason}). They are never loaded, since "
                "loading could run code. Store plain numbers: float16, float32, or uint16 with the bits of bfloat16. "
                f"{REBUILD}."
            ) from error
        raise CacheError(
            f"{where}: the payload {file}{member} cannot be read: it is truncated or broken ({reason}). Delete it. "
            f"{REBUILD}, which makes what is missing."
        ) from error


def as_bytes(values: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor: (nbytes,) uint8, not a copy."""
    return values.reshape(-1).view(torch.uint8).numpy()


# -- reading ---------------------------------------------------------------------------------------------------


class _Scratch(threading.local):
    """Two small buffers of each thread."""

    def __init__(self) -> None:
        self.stored = torch.empty(_CHUNK * 8, dtype=torch.uint8)
        self.floats = torch.empty(PIECE, dtype=torch.float32)


_scratch = _Scratch()


def _read_converted(member: Member, out: torch.Tensor) -> None:
    """Reads chunk by chunk, so that the bytes are still in the processor's cache when their dtype changes."""
    stored, target = DTYPES[member.dtype], out.view(-1)
    read, total = storage.reader(member.file), target.numel()
    values = _scratch.stored[: min(_CHUNK, total) * stored.itemsize].view(stored)
    data, pieces, targets = as_bytes(values), values.split(PIECE), target.split(PIECE)
    for number, start in enumerate(range(0, total, _CHUNK)):
        rest = min(total - start, _CHUNK) * stored.itemsize
        read(member.offset + start * stored.itemsize, data[:rest])
        first = number * len(pieces)
        for piece, out_piece in zip(pieces, targets[first : first + len(pieces)], strict=False):
            _cast(piece if len(out_piece) == len(piece) else piece[: len(out_piece)], out_piece)


def _cast(piece: torch.Tensor, out: torch.Tensor) -> None:
    """Casts at most `PIECE` values. float16 to bfloat16 goes through float32: 3 times faster, equal."""
    if piece.dtype == torch.float16 and out.dtype == torch.bfloat16:
        floats = _scratch.floats
        out.copy_((floats if len(piece) == PIECE else floats[: len(piece)]).copy_(piece))
    else:
        out.copy_(piece)


def _from_numpy(member: Member) -> torch.Tensor:
    """An array that only numpy can decode (compressed, big-endian, in Fortran order): slow, but right."""
    name = member.name if member.name != "txt_ids" else "text_ids"
    with storage.open_file(member.file) as file, numpy_reader, np.load(file, allow_pickle=False) as payload:
        if name in payload.files:
            array = payload[name]
        else:  # channels of the posterior, from `offset` on
            array = payload[VAE_H][member.offset : member.offset + member.shape[0]]
    if array.shape != member.shape:
        raise ValueError(f"shape {array.shape} instead of {member.shape}")
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if member.dtype == "BF16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


# -- rows ------------------------------------------------------------------------------------------------------


class Columns:
    """Columns of one index file, whose first row is row `start` of the complete index; N rows.

    Its methods raise a CacheError that names file, row and value where a column is not what it must be.
    """

    def __init__(self, table: pa.Table, file: str, start: int = 0) -> None:
        self.table, self.file, self.start = table, file, start
        self.names = table.column_names
        self._found: dict[Any, Any] = {}

    def once(self, method: str, *args: Any, **options: Any) -> Any:
        """The result of a method, found once; None where it raises CacheError."""
        key = (method, args, *sorted(options.items()))
        if key not in self._found:
            try:
                self._found[key] = getattr(self, method)(*args, **options)
            except CacheError:
                self._found[key] = None
        return self._found[key]

    def error(self, odd: int | np.ndarray, name: str, needed: str) -> CacheError:
        """Names a row, or the first of the odd ones, (N,) bool."""
        row = odd if isinstance(odd, int) else int(np.argmax(odd))
        value = self.table.column(name)[row].as_py()
        return CacheError(
            f"Row {self.start + row} (in {self.file}): column `{name}` is {value!r}, but must be "
            f"{needed}. Mend the index, or run `sciflow-hf cache build` again."
        )

    def part(self, file: str, start: int, table: pa.Table) -> "Columns":
        """Rows of one of the files whose columns these are, joined; `table` is its own."""
        return _Part(self, table, file, start)

    def column(self, name: str) -> pa.ChunkedArray:
        """One that has a value in every row."""
        if name not in self.names:
            raise CacheError(f"The index {self.file} lacks the column {name!r}. {CONVERT}.")
        column = self.table.column(name)
        if column.null_count:
            raise self.error(column.is_null().to_numpy(), name, "given")
        is_text = types.is_string(column.type) or types.is_large_string(column.type)
        if name.endswith("_path") and len(column) and not is_text:
            raise self.error(0, name, "a path")
        return column

    def suspicious(self, name: str) -> np.ndarray:
        """(N,) bool: whether a path could lead out of its root."""
        paths = self.column(name).cast(pa.large_string())
        found = pc.match_substring_regex(paths, r"\.\.|^[/\\]|^[A-Za-z]:|://|^\.?/*$").to_numpy()
        return np.asarray(found, dtype=bool)

    def files(self, name: str, root: str) -> tuple[list[str], np.ndarray]:
        """Distinct files of a column of paths below `root`, and which of them each row has."""
        encoded = self.column(name).cast(pa.large_string()).combine_chunks().dictionary_encode()
        return [storage.join(root, path) for path in encoded.dictionary.to_pylist()], encoded.indices.to_numpy()

    def numbers(self, name: str, *, least: int = 0, most: int = 2**63 - 1, unit: str = "") -> np.ndarray:
        """(N,) int64, none below `least` (0 or 1) or above `most`."""
        try:
            values = self.column(name).cast(pa.int64()).to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise self.error(0, name, f"a whole number{unit} in every row ({first_line(error)})") from error
        if (odd := values < least).any():
            raise self.error(odd, name, f"a positive number{unit}" if least else "0 or more")
        if (odd := values > most).any():
            raise self.error(odd, name, f"at most {most}{unit}")
        return _compact(values)

    def shapes(self, name: str, form: str = "") -> np.ndarray:
        """Lists or strings ("(32, 64, 48)", "[32, 64, 48]", "32,64,48") -> (N, numbers in `form`), int32.

        Without `form` lists alone, of as many numbers as the first.
        """
        column = self.column(name)
        is_text = types.is_string(column.type) or types.is_large_string(column.type)
        if form and is_text:
            encoded = column.combine_chunks().dictionary_encode()  # few distinct shapes
            shapes = pc.split_pattern_regex(pc.utf8_trim(encoded.dictionary, "[]() ,\t\n"), r"[,\s]+")
            column = pa.chunked_array([shapes.take(encoded.indices)])
        elif not types.is_nested(column.type):
            raise self.error(0, name, f"whole numbers {form}, as a list" + " or a string" * bool(form))
        size = form.count(",") + 1 if form or not len(column) else len(column[0])
        needed = f"{size} positive whole numbers {form}, at most {INT32}"
        try:
            if (odd := pc.not_equal(pc.list_value_length(column), size).to_numpy()).any():
                raise self.error(odd, name, needed)
            shapes = pc.list_flatten(column).cast(pa.int64()).fill_null(0).to_numpy().reshape(len(column), size)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            rows = [
                i for i, row in enumerate(column.to_pylist()) if not all(re.fullmatch(r"\d{1,18}", str(n)) for n in row)
            ]
            raise self.error(rows[0] if rows else 0, name, f"{needed} ({first_line(error)})") from error
        if (odd := ((shapes <= 0) | (shapes > INT32)).any(axis=1)).any():
            raise self.error(odd, name, needed)
        return _compact(shapes.astype(np.int32))

    def source_shapes(self) -> np.ndarray:
        """(N,) of tuples: the shape (C, h, w) of each source of a row, in order; () where it has none."""
        count, name = self.table.num_rows, "source_shapes"
        if name not in self.names:
            return same_everywhere((), count)
        needed = f"a list of shapes (C, h, w) of positive whole numbers, at most {INT32}"
        try:
            shapes = self.table.column(name).combine_chunks().cast(pa.list_(pa.list_(pa.int64())))
            numbers = pc.fill_null(pc.list_value_length(shapes), 0).to_numpy(zero_copy_only=False)
            each = shapes.flatten()
            flat = each.flatten().fill_null(0).to_numpy(zero_copy_only=False)
            three = pc.fill_null(pc.list_value_length(each), 0).to_numpy(zero_copy_only=False) == 3
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise self.error(0, name, f"{needed} ({first_line(error)})") from error
        good = three if not three.all() else ((flat > 0) & (flat <= INT32)).reshape(-1, 3).all(axis=1)
        row_of = np.repeat(np.arange(count), numbers)
        if not good.all():
            raise self.error(int(row_of[np.argmin(good)]), name, needed)
        found = same_everywhere((), count)
        starts = np.cumsum(numbers) - numbers
        for number in np.unique(numbers[numbers > 0]).tolist():
            rows = np.flatnonzero(numbers == number)
            values = flat.reshape(-1, 3)[starts[rows][:, None] + np.arange(number)].reshape(len(rows), -1)
            distinct, which = np.unique(values, axis=0, return_inverse=True)  # few, of which each is kept once
            tuples = [tuple(tuple(row[i : i + 3]) for i in range(0, len(row), 3)) for row in distinct.tolist()]
            found = found if found.flags.writeable else found.copy()
            found[rows] = as_objects(tuples)[which.reshape(-1)]
        return found


class _Part(Columns):
    """Columns of one of many index files, read and checked once for all of them.

    Where the joined columns are not what they must be, each file checks its own, and the faulty one is named.
    """

    def __init__(self, whole: Columns, table: pa.Table, file: str, start: int) -> None:
        super().__init__(table, file, start)
        self._whole, self._rows = whole, slice(start - whole.start, start - whole.start + table.num_rows)

    def suspicious(self, name: str) -> np.ndarray:
        return self._of_whole("suspicious", name)

    def files(self, name: str, root: str) -> tuple[list[str], np.ndarray]:
        found = self._whole.once("files", name, root)
        return super().files(name, root) if found is None else (found[0], found[1][self._rows])

    def numbers(self, name: str, **limits: Any) -> np.ndarray:
        return self._of_whole("numbers", name, **limits)

    def shapes(self, name: str, form: str = "") -> np.ndarray:
        return self._of_whole("shapes", name, form)

    def source_shapes(self) -> np.ndarray:
        return self._of_whole("source_shapes")

    def _of_whole(self, method: str, *args: Any, **options: Any) -> np.ndarray:
        found = self._whole.once(method, *args, **options)
        own = getattr(super(), method)(*args, **options) if found is None else found[self._rows]
        return np.asarray(own)


def same_everywhere(value: Any, count: int) -> np.ndarray:
    """(count,) of one object, without memory for each."""
    return np.broadcast_to(as_objects([value]), count)


def as_objects(values: Sequence[Any]) -> np.ndarray:
    """(N,) of objects, which numpy does not look into."""
    return np.fromiter(values, dtype=object, count=len(values))


class Reader(ABC):
    """Finds the members of the rows of one index file; N rows.

    Args:
        columns: of the index file; at least `columns(payload)`, those of them that it has.
        root: where paths are rooted; a folder or URL.
        payload: of its metadata; {} for npz.
        shapes: those of latents, (N, 3), of embeddings, (N, 2), and of sources, (N,) tuples.

    Attributes:
        tensors: dtype and codec of each stored tensor, where the index says so.

    Raises:
        CacheError: if columns or metadata are not what the library writes.
    """

    told: ClassVar[str] = "column `{}` says"
    """How messages call what says a shape of the index."""

    def __init__(self, columns: Columns, root: str, payload: Mapping[str, Any], *shapes: np.ndarray) -> None:
        self.file, self.root, self.payload = columns.file, root, payload
        self.tensors: dict[str, dict[str, Any]] = payload.get("tensors", {})

    @classmethod
    def columns(cls, payload: Mapping[str, Any]) -> list[str]:
        """The index columns that a reader needs, where a file has them; without the checksums."""
        return ["cache_path"]

    @classmethod
    def completed(cls, table: pa.Table) -> pa.Table:
        """Rows of an index file with the columns that the layout derives from others."""
        return table

    @abstractmethod
    def members(self, i: int, where: object) -> dict[str, Member]:
        """The members of row `i` by name; `where` names the row in errors.

        Raises:
            CacheError: if they are not there, or not what the index says.
        """

    def places(self, name: str) -> dict[tuple[str, int], int]:
        """Bytes of each distinct stored tensor of a name, by file and place in it."""
        return {}

    def files(self) -> set[str]:
        """Payload files of many rows that rows refer to."""
        return set()

    def check_file(self, members: Mapping[str, Member]) -> list[str]:
        """The fault of the payload file of one row alone."""
        return []

    def check(self, member: Member, crc32: int) -> str:
        """The fault of the stored bytes of a member whose checksum this should be (-1: none), or ""."""
        return ""


class ColumnReader(Reader):
    """A reader for payload files of many rows: columns of the index say where the members of each lie.

    For each tensor the columns `<name>_nbytes`, `<name>_crc32` and, but for scales, its shape.
    """

    def __init__(self, columns: Columns, root: str, payload: Mapping[str, Any], *shapes: np.ndarray) -> None:
        super().__init__(columns, root, payload, *shapes)
        _check_tensors(payload, columns.file)
        self._nbytes = {name: columns.numbers(f"{name}_nbytes") for name in self.tensors}
        scales = {spec["scale"] for spec in self.tensors.values() if "scale" in spec}
        known = {"latents": shapes[0], "latents_std": shapes[0], "prompt_embeds": shapes[1]}
        sources = set(source_names_in(self.tensors))
        self._shapes = {
            name: known[name] if name in known else columns.shapes(shape_column(name))
            for name in self.tensors
            if name not in scales | sources
        }
        self._source_shapes = shapes[2] if sources else None

    @classmethod
    def columns(cls, payload: Mapping[str, Any]) -> list[str]:
        ends = ("offset", "nbytes", "path", "shape")
        return ["cache_path", "inline_row", *(f"{name}_{end}" for name in payload.get("tensors", {}) for end in ends)]

    def members(self, i: int, where: object) -> dict[str, Member]:
        found = {}
        for name, shapes in self._shapes.items():
            shape = tuple(shapes[i].tolist())
            scale = self.tensors[name].get("scale")
            below = None if scale is None else self._member(scale, i, shape[:1], None, where)
            found[name] = self._member(name, i, shape, below, where)
        for number, shape in enumerate(() if self._source_shapes is None else self._source_shapes[i]):
            if (name := source_name(number)) in self.tensors:
                found[name] = self._member(name, i, shape, None, where)
        return found

    def _member(self, name: str, i: int, shape: tuple[int, ...], scale: Member | None, where: object) -> Member:
        spec, nbytes = self.tensors[name], int(self._nbytes[name][i])
        file, offset = self._find(name, i, nbytes, where)
        return Member(name, file, offset, nbytes, spec["dtype"], shape, spec["codec"], scale)

    @abstractmethod
    def _find(self, name: str, i: int, nbytes: int, where: object) -> tuple[str, int]:
        """File and offset of a member's bytes."""

    def check(self, member: Member, crc32: int) -> str:
        if crc32 < 0:
            return f"`{member.name}` has no checksum in the index (column `{member.name}_crc32`)"
        same = zlib.crc32(storage.read(member.file, member.offset, member.nbytes)) == crc32
        return "" if same else f"`{member.name}`: its bytes have changed (the checksum differs)"


def _check_tensors(payload: Mapping[str, Any], file: str) -> None:
    tensors = payload.get("tensors")
    if not isinstance(tensors, dict) or ("latents" not in tensors and payload.get("latents") != NO_LATENTS):
        raise CacheError(
            f"The schema metadata of the index {file}: `payload` is {payload!r}, which does not name `latents` among "
            f"its `tensors`. {CONVERT}."
        )
    for name, spec in tensors.items():
        known = isinstance(spec, dict) and spec.get("dtype") in DTYPES and spec.get("codec") in CODECS
        if not known or spec.get("scale", name) not in tensors:
            raise CacheError(
                f"The schema metadata of the index {file} says of `{name}`: {spec!r}. Known are the dtypes "
                f"{', '.join(DTYPES)} and the codecs {', '.join(CODECS)}. {CONVERT}, or use a newer sciflow-hf."
            )


def _compact(values: np.ndarray) -> np.ndarray:
    """The same array without memory for its rows where they are all alike, as in most caches."""
    return np.broadcast_to(values[:1].copy(), values.shape) if len(values) and (values == values[0]).all() else values


def shape_column(name: str) -> str:
    """The index column that holds the shape of a tensor."""
    return "latent_shape" if name in ("latents", "latents_std") else f"{name}_shape"


def payload_columns(payload: Mapping[str, Any]) -> set[str]:
    """All index columns that say where and how large the members of a payload ({} for npz) are."""
    tensors = payload.get("tensors", {})
    found = {f"{name}_{end}" for name in tensors for end in ("offset", "nbytes", "crc32", "path")}
    sized = (
        ("prompt_embeds", *tensors) if payload.get("latents") == NO_LATENTS else ("latents", "prompt_embeds", *tensors)
    )
    found |= {shape_column(name) for name in sized if not source_names_in([name])}
    return {"cache_path", "inline_row", "source_shapes"} | found


# -- writing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tensor in its stored form."""

    dtype: str
    shape: tuple[int, ...]
    data: Any  # bytes-like

    @property
    def nbytes(self) -> int:
        return memoryview(self.data).nbytes


Sample = Mapping[str, "torch.Tensor | Encoded"]


@dataclass(frozen=True)
class Layout:
    """How tensors are stored.

    Attributes:
        payload: "npz" (a file per sample), "shards" or "inline".
        embeds: `prompt_embeds` as they are ("bf16"), in 8 bits with a scale per token ("fp8"), or no text tensors
            at all ("none", for online encoding).
        codec: "none", or "zstd" (lossless).
        dtype: of floating tensors.
        latent_shape: (height, width) of a bucket -> shape of its latents, where these are not stored but encoded in
            training; None: they are.
        sources: the most that a row of the cache has.

    Raises:
        SciflowError: for other values, and for fp8 or zstd in npz files.
    """

    payload: str = "shards"
    embeds: str = "bf16"
    codec: str = "none"
    dtype: torch.dtype = torch.bfloat16
    latent_shape: Callable[[int, int], Sequence[int]] | None = None
    sources: int = 0

    def __post_init__(self) -> None:
        for name, allowed in {"payload": PAYLOADS, "embeds": EMBEDS, "codec": CODECS}.items():
            if (value := getattr(self, name)) not in allowed:
                raise SciflowError(f"`{name}` is {value!r}, but must be one of {', '.join(allowed)}.")
        if self.payload == "npz" and (self.embeds == "fp8" or self.codec != "none"):
            raise SciflowError(
                f"`payload` npz stores neither fp8 nor zstd (`embeds` is {self.embeds!r}, `codec` {self.codec!r}). "
                "Choose shards or inline."
            )

    def tensors(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors that are stored, in the dtypes they are stored in (before fp8)."""
        kept = {}
        for name, value in sample.items():
            name = "txt_ids" if name == "text_ids" else name
            if name in TEXT_TENSORS and self.embeds == "none":
                continue
            if isinstance(value, torch.Tensor):
                if value.is_floating_point():
                    value = value.to(self.dtype)
                elif value.dtype != torch.bool and name not in MASKS:
                    value = value.to(torch.int64)
            kept[name] = value
        return kept

    def encode(self, sample: Sample) -> dict[str, Encoded]:
        """The members of a sample in their stored form; what has it already stays as it is."""
        stored = {}
        for name, value in self.tensors(sample).items():
            if isinstance(value, Encoded):
                stored[name] = value
            elif self.embeds == "fp8" and name == "prompt_embeds":
                codes, scale = quantise(value.detach().cpu())
                stored |= {name: self._encode(codes), f"{name}_scale": self._encode(scale)}
            else:
                stored[name] = self._encode(value)
        return stored

    def no_source(self) -> Encoded:
        """The stored form of a source that a row does not have."""
        return Encoded(DTYPE_NAMES[self.dtype], (), b"")

    def _encode(self, value: torch.Tensor) -> Encoded:
        value = value.detach().cpu().contiguous()
        data: Any = as_bytes(value)
        data = pack(data, value.itemsize) if self.codec == "zstd" else data
        return Encoded(DTYPE_NAMES[value.dtype], tuple(value.shape), data)


@dataclass(frozen=True)
class Block:
    """Rows that are written together: one index file with its payload.

    Attributes:
        name: as "part00000"; sorts like the rows.
        rows: light columns (`image_path`, `caption`, `bucket_h`, ...); the schema metadata under `METADATA_KEY` holds
            the encoder settings. Columns of a payload are left out and made (but those of npz, which it must have).
        prompts: `prompt_hash` of each row. Shards store what follows from a prompt once; None: for every row.
        sources: ids of each row's sources, which shards also store once; empty where no row has sources.
        owners: names of the blocks that store those of these prompts and sources that this one does not.
    """

    name: str
    rows: pa.Table
    prompts: Sequence[str] | None = None
    sources: Sequence[Sequence[str]] = ()
    owners: Mapping[str, str] = field(default_factory=dict)

    @property
    def index_file(self) -> str:
        """Relative to the cache."""
        return index_file(self.name)


def index_file(name: str) -> str:
    """The index of block `name`, relative to the cache."""
    return f"data_{name}.parquet"


class Writer(ABC):
    """Writes blocks in one layout: first the payload of each, then, when that of its owners is there, its index.

    Every file appears complete or not at all. Memory does not grow with a block (inline: with 64 MiB).

    Args:
        output: the cache.
        layout: how tensors are stored.
    """

    payload: ClassVar[str]

    def __init__(self, output: Path, layout: Layout) -> None:
        self.output, self.layout = output, layout

    @abstractmethod
    def has_payload(self, block: Block) -> bool:
        """Whether the payload of a block exists. CacheError if it is broken."""

    def missing(self, block: Block) -> list[int]:
        """Numbers of the rows of a block to write: all of them, unless each has a file of its own."""
        return list(range(block.rows.num_rows))

    def is_ready(self, block: Block) -> bool:
        """Whether all is there that the index of a block, which is to be written, refers to."""
        return self.has_payload(block)

    @abstractmethod
    def write_payload(self, block: Block, samples: Iterable[Sample]) -> None:
        """Writes the tensors of the rows of a block.

        Args:
            samples: the tensors of each row, unbatched: `latents` (C, h, w), `prompt_embeds` (L, D), ...; fresh ones,
                no buffers that are filled again. Shards: a sample without text tensors, or without a source, refers to
                those that the owner of its prompt or source stores; one with them, if these are stored already, gets a
                copy of its own.

        Raises:
            SciflowError: the files cannot be written.
        """

    def write_index(self, block: Block) -> None:
        """Writes the index of a block, if it has none that says the same.

        Raises:
            CacheError: its payload, or that of its owners, is missing or broken.
        """
        columns, tensors = self._columns(block)
        table = light(block.rows, tensors) if columns else block.rows
        for column, array in columns.items():
            table = table.append_column(column, array)
        write_table(self.output / block.index_file, table.replace_schema_metadata(self._facts(block, tensors)))

    def _columns(self, block: Block) -> tuple[dict[str, pa.Array], dict[str, dict[str, str]]]:
        """Columns of a block's index that say where its members lie, and what each tensor is."""
        return {}, {}

    def stored_columns(self, tensor: str, found: Sequence[tuple[Sequence[int], int, int]]) -> dict[str, pa.Array]:
        """Index columns of one tensor from (shape, nbytes, crc32) of each row."""
        columns = {
            f"{tensor}_nbytes": pa.array([nbytes for _, nbytes, _ in found], pa.int64()),
            f"{tensor}_crc32": pa.array([crc32 for _, _, crc32 in found], pa.int64()),
        }
        # `latents_std` has the shape of the latents; `source_shapes` has those of all sources.
        if not tensor.endswith("_scale") and tensor != "latents_std" and not source_names_in([tensor]):
            columns = {shape_column(tensor): pa.array([list(s) for s, _, _ in found], pa.list_(pa.int64()))} | columns
        return columns

    def source_columns(self, shapes: Iterable[Iterable[Sequence[int]]]) -> dict[str, pa.Array]:
        """The index column of the shapes of each row's sources, where the cache has some."""
        lists = [[list(shape) for shape in row] for row in shapes]
        return {"source_shapes": pa.array(lists, pa.list_(pa.list_(pa.int64())))} if self.layout.sources else {}

    def _facts(self, block: Block, tensors: Mapping[str, Mapping[str, str]]) -> dict[bytes, bytes]:
        """Schema metadata of the index: the encoder settings, and how the payload is stored."""
        metadata = block.rows.schema.metadata or {}
        facts = json.loads(metadata.get(METADATA_KEY, b"{}")) | {"embeds": self.layout.embeds}
        facts.pop("payload", None)
        if self.payload != "npz":
            scaled = {
                n: {**s} | ({"scale": f"{n}_scale"} if s["dtype"] == "F8_E4M3" else {}) for n, s in tensors.items()
            }
            facts["payload"] = {"layout": self.payload, "tensors": scaled}
            facts["payload"] |= {} if "latents" in tensors else {"latents": NO_LATENTS}
        return {METADATA_KEY: json.dumps(facts).encode()}


def write_table(file: Path, table: pa.Table) -> None:
    """An index file; left alone if it says just that already."""
    with contextlib.suppress(*BROKEN):  # missing, or broken
        if pq.ParquetFile(file).read().equals(table):
            return
    with output_file(file) as handle:
        pq.write_table(table, handle)


def light(rows: pa.Table, tensors: Collection[str]) -> pa.Table:
    """Rows without the columns that a writer makes of these tensors; the shape of latents that are none stays."""
    made = [name for name in MADE_COLUMNS if name != "latent_shape" or "latents" in tensors]
    return rows.drop_columns([name for name in made if name in rows.column_names])
