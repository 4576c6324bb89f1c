"""The reader of npz payloads: every form that numpy writes, and 2,000 damaged files."""

import io
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import write_cache

from sciflow_hf.data.layouts.base import read_members
from sciflow_hf.data.layouts.npz import npz_members
from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import CacheError


def arrays_of(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "latents": rng.standard_normal((4, 6, 10)).astype(np.float16),
        "prompt_embeds": rng.standard_normal((5, 12)).astype(np.float32),
        "text_ids": np.stack([np.zeros(5, np.int64)] * 3 + [np.arange(5)], axis=1),
        "pooled_prompt_embeds": rng.integers(0, 1 << 15, 7).astype(np.uint16),
        "prompt_embeds_mask": np.array([True, True, False, True, False]),
        "loss_mask": rng.integers(0, 255, (6, 10)).astype(np.uint8),
    }


def read(file: Path) -> dict[str, torch.Tensor]:
    return read_members(npz_members(str(file), "row 0").values(), torch.float32, "row 0")


def as_numpy_reads(file: Path) -> dict[str, torch.Tensor]:
    """What numpy itself makes of the file."""
    result = {}
    with np.load(file) as payload:
        for name in payload.files:
            array = payload[name]
            if array.dtype.newbyteorder("=") == np.uint16:
                array = (array.astype(np.uint32) << 16).view(np.float32)
            elif array.dtype.kind == "f":
                array = array.astype(np.float32)
            elif array.dtype.kind != "b" and name != "loss_mask":
                array = array.astype(np.int64)
            result["txt_ids" if name == "text_ids" else name] = torch.from_numpy(np.ascontiguousarray(array))
    return result


def assert_same(file: Path) -> None:
    ours, numpys = read(file), as_numpy_reads(file)
    assert ours.keys() == numpys.keys()
    for name, values in numpys.items():
        assert ours[name].dtype == values.dtype and torch.equal(ours[name], values), name


def _stored(file: Path, arrays: dict[str, Any]) -> None:
    np.savez(file, **arrays)


def _compressed(file: Path, arrays: dict[str, Any]) -> None:
    np.savez_compressed(file, **arrays)


def _mixed(file: Path, arrays: dict[str, Any]) -> None:
    """Some arrays compressed, some not, as no numpy writes it."""
    with zipfile.ZipFile(file, "w") as archive:
        for n, (name, array) in enumerate(arrays.items()):
            buffer = io.BytesIO()
            np.save(buffer, array)
            archive.writestr(f"{name}.npy", buffer.getvalue(), zipfile.ZIP_DEFLATED if n % 2 else zipfile.ZIP_STORED)


def _big_endian(file: Path, arrays: dict[str, Any]) -> None:
    np.savez(file, **{name: array.astype(array.dtype.newbyteorder(">")) for name, array in arrays.items()})


def _fortran(file: Path, arrays: dict[str, Any]) -> None:
    np.savez(file, **{name: np.asfortranarray(array) for name, array in arrays.items()})


def _with_comment(file: Path, arrays: dict[str, Any]) -> None:
    np.savez(file, **arrays)
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = b"made long ago"


def _many_arrays(file: Path, arrays: dict[str, Any]) -> None:
    """A central directory that is longer than what is read at first."""
    np.savez(file, **arrays, **{f"an_extra_array_with_a_long_name_{n}": np.full(3, n) for n in range(40)})


def _zip64(file: Path, arrays: dict[str, Any]) -> None:
    """All sizes and places in zip64 fields, as a file beyond 4 GiB has them."""
    np.savez(file, **arrays)
    data = file.read_bytes()
    end = data.rindex(b"PK\5\6")
    count, _, start = struct.unpack_from("<HLL", data, end + 10)
    directory, position = b"", start
    for _ in range(count):
        entry = bytearray(data[position : position + 46])
        packed, plain, name, extra, note = struct.unpack_from("<LLHHH", entry, 20)
        (local,) = struct.unpack_from("<L", entry, 42)
        text = data[position + 46 : position + 46 + name]
        field = struct.pack("<HHQQQ", 1, 24, plain, packed, local)
        struct.pack_into("<LLHHH", entry, 20, 0xFFFFFFFF, 0xFFFFFFFF, name, len(field), 0)
        struct.pack_into("<L", entry, 42, 0xFFFFFFFF)
        directory += bytes(entry) + text + field
        position += 46 + name + extra + note
    record = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start)
    place = struct.pack("<4sLQL", b"PK\6\7", 0, start + len(directory), 1)
    last = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    file.write_bytes(data[:start] + directory + record + place + last)


@pytest.mark.parametrize(
    "write",
    [_stored, _compressed, _mixed, _big_endian, _fortran, _many_arrays, _zip64],
    ids=lambda write: write.__name__,
)
def test_every_form_reads_as_numpy_reads_it(tmp_path: Path, write: Callable[[Path, dict[str, Any]], None]) -> None:
    write(tmp_path / "x.npz", arrays_of())
    assert_same(tmp_path / "x.npz")


def test_plain_arrays_are_read_in_place_and_others_by_numpy(tmp_path: Path) -> None:
    _stored(tmp_path / "plain.npz", arrays_of())
    assert {m.codec for m in npz_members(str(tmp_path / "plain.npz"), "x").values()} == {"none"}
    _compressed(tmp_path / "packed.npz", arrays_of())
    assert {m.codec for m in npz_members(str(tmp_path / "packed.npz"), "x").values()} == {"numpy"}


def test_text_beside_the_numbers_is_left_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", latents=np.zeros(3, np.float32), caption=np.array("a figure"))
    assert list(read(tmp_path / "x.npz")) == ["latents"]


def test_an_empty_array_has_its_shape(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", latents=np.zeros((0, 4), np.float16), one=np.float32(2))
    tensors = read(tmp_path / "x.npz")
    assert tensors["latents"].shape == (0, 4) and tensors["one"].shape == () and tensors["one"] == 2


def test_a_comment_behind_the_zip_changes_nothing(tmp_path: Path) -> None:
    _with_comment(tmp_path / "x.npz", arrays_of())
    assert_same(tmp_path / "x.npz")


@pytest.mark.parametrize("keep", [0, 1, 21, 22, 100, 400, 1000, -1, -22, -60])
def test_a_file_cut_short_is_named(tmp_path: Path, keep: int) -> None:
    _stored(tmp_path / "x.npz", arrays_of())
    data = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(data[:keep])
    with pytest.raises(CacheError, match=r"row 0: the payload .*x\.npz.* cannot be read"):
        read(tmp_path / "x.npz")


def test_another_zip_is_no_npz(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CacheError, match=r"not an npz: it holds 'readme\.txt'"):
        read(tmp_path / "x.npz")


# --- fuzz ---


def _data_ranges(file: Path) -> list[range]:
    """Where the bytes of the arrays lie (their own headers included): from the names and sizes of the local headers."""
    ranges, data = [], file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
            start = info.header_offset + 30 + name + extra
            ranges.append(range(start, start + info.compress_size))
    return ranges


def _mutate(data: bytes, rng: random.Random, structure: list[int]) -> tuple[bytes, list[int]]:
    """One of: bytes overwritten, a bit flipped, bytes removed or put in. Returns the places that changed."""
    result = bytearray(data)
    place = rng.choice(structure) if rng.random() < 0.7 else rng.randrange(len(data))
    kind = rng.random()
    if kind < 0.45:
        result[place] ^= 1 << rng.randrange(8)
        return bytes(result), [place]
    if kind < 0.85:
        places = list(range(place, min(place + rng.choice((1, 2, 4, 8)), len(data))))
        for p in places:
            result[p] = rng.choice((0, 0xFF, rng.randrange(256)))
        return bytes(result), [p for p in places if result[p] != data[p]]
    if kind < 0.93:
        del result[place : place + rng.randrange(1, 9)]
    else:
        result[place:place] = rng.randbytes(rng.randrange(1, 9))
    return bytes(result), list(range(place, len(data)))


@pytest.mark.parametrize("write", [_stored, _mixed, _zip64], ids=lambda write: write.__name__)
def test_fuzz(tmp_path: Path, write: Callable[[Path, dict[str, Any]], None]) -> None:
    """2,100 damaged files in all: the right tensors, or an error that names the file; never another shape or dtype.

    A change inside an array may change values: that `verify` finds it is tested in tests/data/test_verify.py.
    """
    folder = write_cache(tmp_path / "cache", buckets={(24, 40): 1})
    file = next(folder.rglob("*.npz"))
    with np.load(file) as payload:
        arrays = dict(payload)
    write(file, arrays)
    cache, data, ranges = load_cache(folder, dtype=torch.float32), file.read_bytes(), _data_ranges(file)
    right = cache[0]
    outside = [p for p in range(len(data)) if not any(p in values for values in ranges)]
    headers = [p for values in ranges for p in values[:128]]
    rng, read_well, refused = random.Random(0), 0, 0
    for n in range(700):
        mutated, changed = _mutate(data, rng, outside + headers)
        if not changed:
            continue
        other = file.with_name(f"{n}.npz")  # a name of its own: nothing read before can be mistaken for it
        other.write_bytes(mutated)
        file.unlink()
        other.rename(file)
        try:
            sample = cache[0]
        except CacheError as error:
            assert str(file) in str(error)
            refused += 1
            continue
        read_well += 1
        for name in ("latents", "prompt_embeds"):
            assert sample[name].shape == right[name].shape and sample[name].dtype == right[name].dtype
        if not any(p in values for p in changed for values in ranges):
            assert all(torch.equal(sample[name], right[name]) for name in sample), (n, changed)
    assert read_well > 80 and refused > 100, "both happen"
