"""One stored array of a sample: where its bytes lie, what they mean, and how they become a tensor."""

import contextlib
import math
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ...errors import CacheError
from .. import storage

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes as in safetensors files."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
BROKEN = (
    OSError, EOFError, ValueError, OverflowError, MemoryError, KeyError, RuntimeError, SyntaxError,
    NotImplementedError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
"""What the libraries below raise for a file that is not what it should be."""
numpy_reader = threading.Lock()
"""numpy reads the headers of arrays by `ast`, which in Python 3.11 may fail in two threads at once."""
REBUILD = "Run `sciflow-hf cache build` again"
_CHUNK = 1 << 17  # values read at once: what fits into the processor's cache while their dtype is changed
_PIECE = 1 << 15  # values changed at once: torch would start threads of its own for more
_FP8_MAX = 448.0
_SIGN_EXPONENT_MANTISSA = 0x87F0 - (1 << 16)  # bits of an int16


@dataclass(frozen=True, slots=True)
class Member:
    """One stored array.

    Attributes:
        name: key in a batch.
        file: path or URL.
        offset, nbytes: of the stored bytes in the file.
        dtype: of the values, as in safetensors files ("BF16").
        shape: of the array.
        codec: "none"; "zstd" (see `encode_member`); "numpy" for an array that numpy has to decode.
        crc32: of the stored bytes, where it is known without a look into the index.
        scale: of an "F8_E4M3" array: float32, (shape[0],), one per token.
    """

    name: str
    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    codec: str = "none"
    crc32: int | None = None
    scale: "Member | None" = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def target_dtype(member: Member, dtype: torch.dtype) -> torch.dtype:
    """What an array becomes: floats `dtype`; truth values and `loss_mask` stay; other whole numbers int64."""
    stored = DTYPES[member.dtype]
    if member.name == "txt_ids":
        return torch.int64
    if stored.is_floating_point:
        return dtype
    return stored if stored == torch.bool or member.name == "loss_mask" else torch.int64


def read_member(member: Member, out: torch.Tensor, where: str) -> None:
    """Fills `out`, contiguous and of the member's shape, in the dtype of `out`.

    Raises:
        CacheError: naming `where` and the file, if the bytes are not there or do not decode.
    """
    with explain(member, where):
        if tuple(out.shape) != member.shape:
            raise ValueError(f"shape {member.shape} does not fit into {tuple(out.shape)}")
        if member.codec == "numpy":
            out.copy_(_from_numpy(member))
        elif member.codec == "zstd":
            data = np.empty(member.nbytes, dtype=np.uint8)
            storage.read_into(member.file, member.offset, data)
            same = DTYPES[member.dtype] == out.dtype
            values = out if same else torch.empty(member.shape, dtype=DTYPES[member.dtype])
            _unpack(data, values)
            if not same:
                _convert(values, out, _read_scale(member, where))
        elif member.nbytes != member.numel * DTYPES[member.dtype].itemsize:
            raise ValueError(f"{member.nbytes} bytes cannot be {member.dtype} of shape {member.shape}")
        elif DTYPES[member.dtype] == out.dtype:
            storage.read_into(member.file, member.offset, as_bytes(out))
        else:
            _read_converted(member, out, _read_scale(member, where))


def read_members(members: Iterable[Member], dtype: torch.dtype, where: str) -> dict[str, torch.Tensor]:
    """New tensors of some arrays, by name; floating ones in `dtype`. See `read_member`."""
    tensors = {}
    for member in members:
        tensors[member.name] = torch.empty(member.shape, dtype=target_dtype(member, dtype))
        read_member(member, tensors[member.name], where)
    return tensors


@contextlib.contextmanager
def explain(member: Member, where: str) -> Iterator[None]:
    """Turns what goes wrong while a member is read into a CacheError that names it."""
    try:
        yield
    except CacheError:
        raise
    except FileNotFoundError as error:
        raise missing_file(member.file, where) from error
    except BROKEN as error:
        raise unreadable(member.file, where, str(error), member.name) from error


def missing_file(file: str, where: str) -> CacheError:
    return CacheError(
        f"{where}: the payload {file} (column `cache_path`) is missing. Say where the payloads are by "
        "`--payload_dir`, or run `sciflow-hf cache build` again."
    )


def unreadable(file: str, where: str, reason: str, name: str = "") -> CacheError:
    member = f", array `{name}`," if name else ""
    if "pickle" in reason or "Object arrays" in reason:
        return CacheError(
            f"{where}: the payload {file}{member} holds pickled objects ({reason}). They are never loaded, since "
            "loading could run code. Store plain numbers: float16, float32, or uint16 with the bits of bfloat16. "
            f"{REBUILD}."
        )
    return CacheError(
        f"{where}: the payload {file}{member} cannot be read: it is truncated or broken ({reason}). Delete it. "
        f"{REBUILD}, which makes what is missing."
    )


def as_bytes(values: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor: (nbytes,) uint8, not a copy."""
    return values.reshape(-1).view(torch.uint8).numpy()


# -- decoding --------------------------------------------------------------------------------------------------


class _Scratch(threading.local):
    """Two small buffers of each thread."""

    def __init__(self) -> None:
        self.stored = torch.empty(_CHUNK * 8, dtype=torch.uint8)
        self.floats = torch.empty(_PIECE, dtype=torch.float32)


_scratch = _Scratch()


def _read_converted(member: Member, out: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Reads chunk by chunk, so that the bytes are still in the processor's cache when their dtype changes."""
    stored, target = DTYPES[member.dtype], out.view(-1)
    if scale is not None:
        values = torch.empty(member.shape, dtype=stored)
        storage.read_into(member.file, member.offset, as_bytes(values))
        _convert(values, out, scale)
        return
    read, total = storage.reader(member.file), target.numel()
    values = _scratch.stored[: min(_CHUNK, total) * stored.itemsize].view(stored)
    data, pieces, targets = as_bytes(values), values.split(_PIECE), target.split(_PIECE)
    for number, start in enumerate(range(0, total, _CHUNK)):
        rest = min(total - start, _CHUNK) * stored.itemsize
        read(member.offset + start * stored.itemsize, data[:rest])
        first = number * len(pieces)
        for piece, out_piece in zip(pieces, targets[first : first + len(pieces)], strict=False):
            _cast(piece if len(out_piece) == len(piece) else piece[: len(out_piece)], out_piece)


def _convert(values: torch.Tensor, out: torch.Tensor, scale: torch.Tensor | None) -> None:
    if scale is not None:
        _dequantise(values, scale, out)
    else:
        for piece, target in zip(values.view(-1).split(_PIECE), out.view(-1).split(_PIECE), strict=True):
            _cast(piece, target)


def _cast(piece: torch.Tensor, out: torch.Tensor) -> None:
    """Of at most `_PIECE` values. float16 to bfloat16 goes through float32: 3 times faster, equal."""
    if piece.dtype == torch.float16 and out.dtype == torch.bfloat16:
        floats = _scratch.floats
        out.copy_((floats if len(piece) == _PIECE else floats[: len(piece)]).copy_(piece))
    else:
        out.copy_(piece)


def _from_numpy(member: Member) -> torch.Tensor:
    """An array that only numpy can decode (compressed, big-endian, in Fortran order): slow, but right."""
    with storage.open_file(member.file) as file, numpy_reader, np.load(file, allow_pickle=False) as payload:
        array = payload[member.name if member.name != "txt_ids" else "text_ids"]
    if array.shape != member.shape:
        raise ValueError(f"shape {array.shape} in place of {member.shape}")
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if member.dtype == "BF16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _read_scale(member: Member, where: str) -> torch.Tensor | None:
    if member.scale is None:
        return None
    scale = torch.empty(member.scale.shape, dtype=torch.float32)
    read_member(member.scale, scale, where)
    return scale


# -- fp8 and zstd ----------------------------------------------------------------------------------------------


def quantise(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(L, D) -> float8 e4m3 (L, D) and its float32 scale (L,): the largest value of a token becomes 448.

    Micikevicius et al. 2022, "FP8 formats for deep learning".
    """
    values = values.float()
    scale = values.abs().amax(dim=-1) / _FP8_MAX
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (values / scale[..., None]).to(torch.float8_e4m3fn), scale


def _dequantise(values: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Moves the bits of float8 e4m3 to their places in a bfloat16, which is 2**-120 times the value, and scales.

    Exact up to the last rounding (infinities and NaN, which `quantise` does not make, apart); 5 times faster than
    torch's own cast of float8.
    """
    codes, target = values.reshape(len(scale), -1).view(torch.int8), out.view(len(scale), -1)
    rows = max(1, _PIECE // max(1, codes.shape[1]))
    for start in range(0, len(scale), rows):
        bits = codes[start : start + rows].to(torch.int16)  # the sign comes along
        bits.bitwise_left_shift_(4).bitwise_and_(_SIGN_EXPONENT_MANTISSA)
        floats = bits.view(torch.bfloat16).mul_(2.0**120).float()
        target[start : start + rows].copy_(floats.mul_(scale[start : start + rows, None]))


def _unpack(data: np.ndarray, out: torch.Tensor) -> None:
    """The inverse of `_pack`."""
    import pyarrow as pa

    high_bytes = out.dtype.itemsize == 2
    raw = out.numel() if high_bytes else 0
    if len(data) < raw:
        raise ValueError(f"{len(data)} bytes cannot hold {out.numel()} values")
    packed, size = pa.py_buffer(data[: len(data) - raw]), out.numel() * out.dtype.itemsize - raw
    try:
        plain = np.frombuffer(pa.Codec("zstd").decompress(packed, decompressed_size=size), dtype=np.uint8)
    except pa.ArrowException as error:
        raise ValueError(f"zstd: {error}") from error
    if len(plain) != size:
        raise ValueError(f"zstd: {len(plain)} bytes in place of {size}")
    if high_bytes:
        words = as_bytes(out).view("<u2")
        np.left_shift(plain, 8, out=words, dtype=np.uint16)
        np.bitwise_or(words, np.frombuffer(data, dtype=np.uint8, offset=len(data) - raw), out=words)
    else:
        as_bytes(out)[:] = plain


def _pack(values: torch.Tensor) -> bytes:
    """zstd of the high bytes of 16-bit values (sign and exponent, which repeat), their low bytes behind as they are."""
    import pyarrow as pa

    data = as_bytes(values.contiguous())
    codec = pa.Codec("zstd", compression_level=1)
    if values.dtype.itemsize != 2:
        return codec.compress(data.tobytes(), asbytes=True)
    return codec.compress(data[1::2].tobytes(), asbytes=True) + data[0::2].tobytes()


@dataclass(frozen=True, slots=True)
class Stored:
    """What a writer stores of an array: `suffix` is "" or "_scale"."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    data: Any  # bytes-like


def encode_member(values: torch.Tensor, *, codec: str = "none", fp8: bool = False) -> list[Stored]:
    """The stored form of an array, on the CPU.

    Args:
        values: kept in their dtype.
        codec: "none", or "zstd": lossless; of 16-bit values zstd of all high bytes, then all low bytes.
        fp8: store float8 e4m3 with a float32 scale per token instead of the values.
    """
    values = values.detach().cpu().contiguous()
    if fp8:
        codes, scale = quantise(values)
        return [*encode_member(codes, codec=codec), replace(encode_member(scale, codec=codec)[0], suffix="_scale")]
    data = _pack(values) if codec == "zstd" else as_bytes(values)
    return [Stored("", DTYPE_NAMES[values.dtype], tuple(values.shape), data)]
