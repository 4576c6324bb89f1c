"""npz payloads without numpy's copies: where each array's bytes lie in the zip, so that they are read in place."""

import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...errors import CacheError
from .. import storage
from ..writing import output_file
from .members import BROKEN, Member, missing_file, numpy_reader, unreadable

if TYPE_CHECKING:
    import pyarrow as pa

_TAIL = 1 << 10  # bytes; holds the central directory of a handful of arrays
_LARGEST_DIRECTORY = 1 << 24
_HEAD = 256  # bytes; holds a local header and the array's own header
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_PLACE = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_DTYPES = {
    "f2": "F16", "f4": "F32", "f8": "F64",
    "i1": "I8", "i2": "I16", "i4": "I32", "i8": "I64",
    "u1": "U8", "u2": "U16", "u4": "U32", "u8": "U64", "b1": "BOOL",
}  # fmt: skip
_HEADER = re.compile(
    rb"\{\s*'descr':\s*'(?P<descr>[^']*)',\s*'fortran_order':\s*(?P<fortran>True|False),"
    rb"\s*'shape':\s*(?P<shape>\((?:\d+, ?)*\d*\)),?\s*\}\s*"
)


class NotPlain(Exception):
    """An array that is not stored as plain bytes, and why."""


def npz_members(file: str, where: str) -> dict[str, Member]:
    """The arrays of an npz, by name; `text_ids` is called `txt_ids`, as in a batch.

    uint16 arrays hold the bits of bfloat16 (masks and ids apart). Arrays that are compressed, big-endian or in
    Fortran order get the codec "numpy". Nothing is unpickled; arrays of text and the like are left out.

    Raises:
        CacheError: a missing or broken file, or pickled objects.
    """
    try:
        members = _members(file)
    except FileNotFoundError as error:
        raise missing_file(file, where) from error
    except CacheError:
        raise
    except BROKEN as error:
        raise unreadable(file, where, str(error)) from error
    return {member.name: member for member in members if member is not None}


def _members(file: str) -> list[Member | None]:
    length = storage.size(file)
    entries = _central_directory(file, length)
    names = [name for name, *_ in entries]
    if len(set(names)) != len(names):
        raise ValueError(f"not an npz: an array twice in {names}")
    return [_member(file, length, *entry) for entry in entries]


_Entry = tuple[str, int, int, int, int, int, int]


def _central_directory(file: str, length: int) -> list[_Entry]:
    """(name, method, flags, crc32, compressed size, size, offset of the local header) of each file of a zip."""
    if length < _END.size:
        raise ValueError("not an npz: too short")
    tail = storage.read(file, max(0, length - _TAIL), min(_TAIL, length))
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > len(tail):
        raise ValueError("not an npz: no end of a zip")
    _, disk, first_disk, _, count, size, start, comment = _END.unpack_from(tail, at)
    end = length - len(tail) + at
    if disk or first_disk or end + _END.size + comment != length:
        raise ValueError("not an npz: wrong end record")
    place = at - _END64_PLACE.size
    if place >= 0 and tail.startswith(b"PK\6\7", place):
        where = _END64_PLACE.unpack_from(tail, place)[2]
        if where + _END64.size > end:
            raise ValueError("not an npz: wrong zip64 record")
        found, *_, count, size, start = _END64.unpack(storage.read(file, where, _END64.size))
        if found != b"PK\6\6":
            raise ValueError("not an npz: wrong zip64 record")
        end = where
    if size > _LARGEST_DIRECTORY or start + size != end:
        raise ValueError("not an npz: wrong central directory")
    directory = (
        tail[len(tail) - (length - start) :][:size] if length - start <= len(tail) else storage.read(file, start, size)
    )
    entries, position = [], 0
    for _ in range(count):
        found, _, _, flags, method, _, _, crc, packed, plain, name, extra, note, *_, local = _ENTRY.unpack_from(
            directory, position
        )
        if found != b"PK\1\2":
            raise ValueError("not an npz: wrong central directory")
        position += _ENTRY.size
        text = directory[position : position + name].decode("utf-8" if flags & 0x800 else "cp437")
        sizes = _zip64(directory[position + name : position + name + extra], plain, packed, local)
        position += name + extra + note
        entries.append((text, method, flags, crc, sizes[1], sizes[0], sizes[2]))
    if position != size:
        raise ValueError("not an npz: wrong central directory")
    return entries


def _zip64(extra: bytes, *values: int) -> list[int]:
    """Values of a directory entry, those that did not fit into 32 bits replaced from its zip64 field."""
    result, position = list(values), 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        position += 4
        if kind == 1:
            field = iter(struct.unpack_from(f"<{size // 8}Q", extra, position))
            result = [next(field, value) if value == 0xFFFFFFFF else value for value in values]
        position += size
    return result


def _member(
    file: str, length: int, name: str, method: int, flags: int, crc: int, packed: int, plain: int, local: int
) -> Member | None:
    if not name.endswith(".npy"):
        raise ValueError(f"not an npz: it holds {name!r}")
    key = name.removesuffix(".npy")
    head = storage.read(file, local, min(_HEAD, length - local)) if local < length else b""
    if len(head) < _LOCAL.size or not head.startswith(b"PK\3\4"):
        raise ValueError(f"not an npz: no local header of {name!r}")
    _, _, local_flags, local_method, *_, name_size, extra = _LOCAL.unpack_from(head)
    start = local + _LOCAL.size + name_size + extra
    if local_method != method or (local_flags ^ flags) & 0x801 or flags & 1:
        raise ValueError(f"not an npz: the local header of {name!r} disagrees with the directory")
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
    if dtype == "BF16" and key.endswith(("_mask", "_ids")):
        dtype = "U16"
    member = Member("txt_ids" if key == "text_ids" else key, file, start + offset, packed - offset, dtype, shape, codec)
    if codec == "none" and member.nbytes != member.numel * int(np.dtype(_numpy_name(dtype)).itemsize):
        raise ValueError(f"array `{key}` has {member.nbytes} bytes, which is not {dtype} of shape {shape}")
    return member


def _numpy_name(dtype: str) -> str:
    return next((code for code, name in _DTYPES.items() if name == dtype), "u2")


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
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with (
            storage.open_file(file) as handle,
            numpy_reader,
            zipfile.ZipFile(handle) as archive,
            archive.open(f"{key}.npy") as array,
        ):
            version = np.lib.format.read_magic(array)
            if version not in readers:
                raise ValueError(f"a header of version {version}")
            shape, _, dtype = readers[version](array)
    except BROKEN as error:
        raise ValueError(f"array `{key}`: {error}") from error
    if dtype.hasobject:
        raise ValueError(f"array `{key}`: pickled objects")
    code = f"{dtype.kind}{dtype.itemsize}"
    if code not in _DTYPES:
        if key == "text_ids":
            raise ValueError(f"array `{key}` is {dtype}, not numbers")
        return None
    return ("BF16" if code == "u2" else _DTYPES[code]), shape


class NpzPart:
    """The rows of one index file whose payloads are npz files below `root`."""

    def __init__(self, root: str, cache_paths: "pa.ChunkedArray") -> None:
        self.root, self.cache_paths = root, cache_paths

    def members(self, i: int, where: str) -> dict[str, Member]:
        """The arrays of row `i`."""
        return npz_members(storage.join(self.root, self.cache_paths[i].as_py()), where)


def write_npz(file: Path, sample: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """An npz of tensors: floating ones in `dtype` (bfloat16 as bits in uint16), masks as they are, other int64."""
    arrays = {name: _array(value, dtype) for name, value in sample.items()}
    with output_file(file) as handle:
        np.savez(handle, **arrays)  # type: ignore[arg-type]


def _array(value: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    value = value.detach().cpu()
    if not value.is_floating_point():
        return (value if value.dtype in (torch.bool, torch.uint8) else value.to(torch.int64)).numpy()
    value = value.to(dtype).contiguous()
    if dtype == torch.bfloat16:  # numpy has no bfloat16
        return value.view(torch.int16).numpy().view(np.uint16)
    return value.numpy()
