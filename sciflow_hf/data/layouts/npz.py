"""npz: one file a sample; where each array's bytes lie in the zip, so that they are read without numpy's copies."""

import contextlib
import io
import math
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import storage
from ..writing import output_file
from .base import (
    BROKEN,
    DTYPES,
    VAE_H,
    Block,
    Columns,
    Member,
    Reader,
    Sample,
    Writer,
    explain,
    numpy_reader,
)

_TEXT_PATH = "text_cache_path"
_TAIL = 1 << 10  # bytes; holds the central directory of a handful of arrays
_HEAD = 256  # bytes; holds a local header and the array's own header
_LARGEST_DECODED = 256 << 20  # bytes; ten times the text of a FLUX model in float32. zlib packs zeros a thousandfold
_LOCAL = struct.Struct("<4s5H3L2H")
_ZIP64 = struct.Struct("<4x2Q")
_HAS_DESCRIPTOR = 8  # flag: the local header leaves CRC and sizes to a record behind the data
_DTYPES = {
    "f2": "F16", "f4": "F32", "f8": "F64",
    "i1": "I8", "i2": "I16", "i4": "I32", "i8": "I64",
    "u1": "U8", "u2": "U16", "u4": "U32", "u8": "U64", "b1": "BOOL",
}  # fmt: skip
_HEADER = re.compile(
    rb"\{\s*'descr':\s*'(?P<descr>[^']*)',\s*'fortran_order':\s*(?P<fortran>True|False),"
    rb"\s*'shape':\s*(?P<shape>\((?:\d+, ?)*\d*\)),?\s*\}\s*"
)


# -- reading ---------------------------------------------------------------------------------------------------


class NpzReader(Reader):
    """Rows whose payloads are npz files of their own, named by `cache_path`, their text perhaps by another column."""

    def __init__(self, columns: Columns, root: str, payload: Mapping[str, Any], *shapes: np.ndarray) -> None:
        super().__init__(columns, root, payload, *shapes)
        self._paths = columns.column("cache_path")
        self._texts = columns.column(_TEXT_PATH) if _TEXT_PATH in columns.names else None

    @classmethod
    def columns(cls, payload: Mapping[str, Any]) -> list[str]:
        return ["cache_path", _TEXT_PATH]

    def members(self, i: int, where: object) -> dict[str, Member]:
        found = npz_members(storage.join(self.root, self._paths[i].as_py()), where)
        if self._texts is None:
            return found
        text = npz_members(storage.join(self.root, self._texts[i].as_py()), where)
        return found | {name: member for name, member in text.items() if not name.startswith("latents")}

    def check_file(self, members: Mapping[str, Member]) -> list[str]:
        return npz_problems(members["latents"].file)


class NotPlain(Exception):
    """An array that is not stored as plain bytes, and why."""


def npz_members(file: str, where: object) -> dict[str, Member]:
    """The arrays of an npz, by name; `text_ids` is called `txt_ids`, as in a batch.

    uint16 arrays hold the bits of bfloat16 (masks and ids apart). Arrays that are compressed, big-endian or in
    Fortran order get the codec "numpy". Nothing is unpickled; arrays of text and the like are left out. `vae_h`, mean
    and log-variance of a posterior, becomes `latents` and `latents_std`.

    Raises:
        CacheError: a missing or broken file, or pickled objects.
    """
    with explain(file, where):
        length = storage.size(file)
        entries, start = _directory(file, length)
        names = [info.orig_filename for info in entries]
        if len(set(names)) != len(names):
            raise ValueError(f"not an npz: an array twice in {names}")
        members = [_member(file, length, info, start + info.header_offset) for info in entries]
        found = {member.name: member for member in members if member is not None}
        return found if VAE_H not in found or "latents" in found else found | _posterior(found.pop(VAE_H))


def _posterior(member: Member) -> dict[str, Member]:
    """`vae_h` (2C, h, w) as `latents`, its mean, and `latents_std`."""
    if len(member.shape) != 3 or member.shape[0] % 2:
        raise ValueError(f"array `{VAE_H}` has shape {member.shape}, which is no mean and log-variance (2C, h, w)")
    shape, half = (member.shape[0] // 2, *member.shape[1:]), member.nbytes // 2
    mean = replace(member, name="latents", nbytes=half, shape=shape)
    behind = member.offset + half
    if member.codec == "numpy":  # offsets are channels of the array that numpy decodes
        mean, behind = replace(mean, offset=0, nbytes=member.nbytes), shape[0]
    return {"latents": mean, "latents_std": replace(mean, name="latents_std", offset=behind, log_variance=True)}


def _directory(file: str, length: int) -> tuple[list[zipfile.ZipInfo], int]:
    """The central directory of a zip, and where in the file its offsets begin."""
    end = storage.read(file, max(0, length - _TAIL), min(_TAIL, length))
    with contextlib.suppress(zipfile.BadZipFile, ValueError):  # the directory is longer than that
        return _entries(io.BytesIO(end)), length - len(end)
    try:
        with storage.open_file(file) as handle:
            return _entries(handle), 0
    except zipfile.BadZipFile as error:
        raise ValueError(f"not an npz: {error}") from error


def _entries(handle: Any) -> list[zipfile.ZipInfo]:
    """The entries of a zip's central directory; as many as the record behind it says."""
    archive = zipfile.ZipFile(handle)
    entries = archive.infolist()
    names = (info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437") for info in entries)
    lengths = (46 + len(n) + len(i.extra) + len(i.comment) for n, i in zip(names, entries, strict=True))
    handle.seek(archive.start_dir + sum(lengths))
    record = handle.read(40)
    count = {b"PK\5\6": record[10:12], b"PK\6\6": record[32:40]}.get(record[:4], b"")
    if int.from_bytes(count, "little") != len(entries):
        raise zipfile.BadZipFile("its central directory has another number of entries")
    return entries


def _member(file: str, length: int, info: zipfile.ZipInfo, local: int) -> Member | None:
    name, method, flags, packed, plain = (
        info.orig_filename, info.compress_type, info.flag_bits, info.compress_size, info.file_size,
    )  # fmt: skip
    if not name.endswith(".npy"):
        raise ValueError(f"not an npz: it holds {name!r}")
    key = name.removesuffix(".npy")
    head = storage.read(file, local, min(_HEAD, length - local)) if 0 <= local < length else b""
    if len(head) < _LOCAL.size or not head.startswith(b"PK\3\4"):
        raise ValueError(f"not an npz: no local header of {name!r}")
    _, _, local_flags, local_method, _, _, crc, *sizes, name_size, extra = _LOCAL.unpack_from(head)
    start = local + _LOCAL.size + name_size + extra
    if sizes == [0xFFFFFFFF] * 2:  # zip64
        sizes = list(reversed(_ZIP64.unpack_from(head, _LOCAL.size + name_size)))
    told = local_flags & _HAS_DESCRIPTOR or (crc, *sizes) == (info.CRC, packed, plain)
    if (local_flags, local_method) != (flags, method) or flags & 1 or not told:
        raise ValueError(f"not an npz: the local header of {name!r} and the directory disagree")
    named = head[_LOCAL.size : _LOCAL.size + name_size]
    if len(named) == name_size and named != name.encode("utf-8" if flags & 0x800 else "cp437"):
        raise ValueError(f"not an npz: the local header of {name!r} has another name")
    if start + packed > length:
        raise ValueError(f"array `{key}` ends behind the file")
    try:
        if method != zipfile.ZIP_STORED or packed != plain:
            raise NotPlain("compressed")
        offset, dtype, shape = _array_header(file, head[start - local :], start, packed)
        codec = "none"
    except NotPlain:
        header = _decoded_header(file, key)
        if header is None:
            return None
        (dtype, shape), offset, codec = header, 0, "numpy"
        if (decoded := math.prod(shape) * DTYPES[dtype].itemsize) > _LARGEST_DECODED:
            raise ValueError(
                f"array `{key}` would take {decoded >> 20:,} MiB of memory, more than {_LARGEST_DECODED >> 20} MiB"
            ) from None
    if dtype == "BF16" and key.endswith(("_mask", "_ids")):
        dtype = "U16"
    member = Member("txt_ids" if key == "text_ids" else key, file, start + offset, packed - offset, dtype, shape, codec)
    if codec == "none" and member.nbytes != member.numel * DTYPES[dtype].itemsize:
        raise ValueError(f"array `{key}` has {member.nbytes} bytes, which is not {dtype} of shape {shape}")
    return member


def _array_header(file: str, head: bytes, start: int, size: int) -> tuple[int, str, tuple[int, ...]]:
    """Offset of the values, dtype and shape of a stored .npy; NotPlain where numpy has to have a look."""
    if size < 10 or len(head) < 10:
        head = storage.read(file, start, min(size, _HEAD))
    if head[:6] != b"\x93NUMPY":
        raise ValueError("not an array of numpy")
    if head[6] != 1:
        raise NotPlain("a header of version 2 or 3")
    end = 10 + int.from_bytes(head[8:10], "little")
    if end > size:
        raise ValueError("the header of an array is longer than the array")
    text = head[10:end] if end <= len(head) else storage.read(file, start + 10, end - 10)
    found = _HEADER.fullmatch(text)
    if found is None or found["fortran"] == b"True":
        raise NotPlain("fields, Fortran order")
    dtype = _dtype_name(found["descr"].decode("latin1"))
    return end, dtype, tuple(int(n) for n in re.findall(rb"\d+", found["shape"]))


def _dtype_name(descr: str) -> str:
    """ "<f2" -> "F16"; uint16 holds the bits of bfloat16."""
    if descr[:1] == "|" and descr[1:] in ("i1", "u1", "b1"):
        return _DTYPES[descr[1:]]
    if descr[:1] != "<" or descr[1:] not in _DTYPES:
        raise NotPlain(f"dtype {descr}")
    return "BF16" if descr == "<u2" else _DTYPES[descr[1:]]


def _decoded_header(file: str, key: str) -> tuple[str, tuple[int, ...]] | None:
    """dtype and shape of an array that numpy has to decode; None for arrays of text and the like."""
    try:
        with (
            storage.open_file(file) as handle,
            numpy_reader,
            zipfile.ZipFile(handle) as archive,
            archive.open(f"{key}.npy") as array,
        ):
            major, _ = np.lib.format.read_magic(array)
            shape, _, dtype = getattr(np.lib.format, f"read_array_header_{major}_0")(array)
    except AttributeError as error:
        raise ValueError(f"array `{key}`: a header of version {major}") from error
    except BROKEN as error:
        raise ValueError(f"array `{key}`: {error}") from error
    if dtype.hasobject:
        raise ValueError(f"array `{key}`: pickled objects")
    code = f"{dtype.kind}{dtype.itemsize}"
    if code not in _DTYPES and key == "text_ids":
        raise ValueError(f"array `{key}` is {dtype}, not numbers")
    return (("BF16" if code == "u2" else _DTYPES[code]), shape) if code in _DTYPES else None


def npz_problems(file: str) -> list[str]:
    """Faults of a zip, by the checksums of its files."""
    try:
        with storage.open_file(file) as handle, zipfile.ZipFile(handle) as archive:
            bad = archive.testzip()
    except BROKEN as error:
        return [f"not a complete zip ({error})"]
    return [] if bad is None else [f"{bad}: its bytes have changed (the checksum differs)"]


# -- writing ---------------------------------------------------------------------------------------------------


class NpzWriter(Writer):
    """The file that each row's `cache_path` names. Files that are there stay."""

    payload = "npz"

    def has_payload(self, block: Block) -> bool:
        return not self.missing(block)

    def missing(self, block: Block) -> list[int]:
        paths = block.rows.column("cache_path").to_pylist()
        return [row for row, path in enumerate(paths) if not (self.output / path).is_file()]

    def write_payload(self, block: Block, samples: Iterable[Sample]) -> None:
        for path, sample in zip(block.rows.column("cache_path").to_pylist(), samples, strict=True):
            write_npz(self.output / path, self.layout.tensors(sample), self.layout.dtype)


def write_npz(file: Path, sample: Mapping[str, torch.Tensor], dtype: torch.dtype, *, durable: bool = True) -> None:
    """An npz of tensors: floating ones in `dtype` (bfloat16 as bits in uint16), masks as they are, other int64.

    `durable` as in `output_file`.
    """
    arrays = {"text_ids" if name == "txt_ids" else name: _array(value, dtype) for name, value in sample.items()}
    with output_file(file, durable=durable) as handle:
        np.savez(handle, **arrays)  # type: ignore[arg-type]


def _array(value: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    value = value.detach().cpu()
    if not value.is_floating_point():
        return (value if value.dtype in (torch.bool, torch.uint8) else value.to(torch.int64)).numpy()
    value = value.to(dtype).contiguous()
    if dtype == torch.bfloat16:  # numpy has no bfloat16
        return value.view(torch.int16).numpy().view(np.uint16)
    return value.numpy()
