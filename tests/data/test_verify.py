"""`verify_cache` finds every change of a stored byte, whatever is wrong is named, and a repaired index is clean."""

import hashlib
import json
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from caches import encoder_settings, write_cache

from sciflow_hf.data.build.convert import convert_cache
from sciflow_hf.data.inspect.repair import write_repaired
from sciflow_hf.data.inspect.verify import VerifyReport, verify_cache
from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import CacheError, SciflowError

LAYOUTS = {
    "npz": None,
    "shards": {"payload": "shards"},
    "inline": {"payload": "inline"},
    "shards zstd": {"payload": "shards", "codec": "zstd"},
    "inline zstd": {"payload": "inline", "codec": "zstd"},
    "shards fp8": {"payload": "shards", "embeds": "fp8"},
    "inline fp8 zstd": {"payload": "inline", "embeds": "fp8", "codec": "zstd"},
}
BUCKETS = {(32, 48): 3, (48, 32): 2, (24, 64): 1}
ROWS = 6


def make(folder: Path, layout: str, change: Callable[[Path], object] | None = None, **options: object) -> Path:
    """A cache of 6 rows with masks, in some layout; rows 0 and 2 have the same caption and embeddings."""
    source = write_cache(folder / "source", settings=encoder_settings("/models/m"), buckets=BUCKETS, **options)
    table = pq.read_table(part_of(source))
    paths = [source / path for path in table.column("cache_path").to_pylist()]
    text = dict(np.load(paths[0]))["prompt_embeds"]
    for row, path in enumerate(paths):
        arrays = dict(np.load(path))
        shape = arrays["latents"].shape[1:]
        arrays["loss_mask"] = np.arange(shape[0] * shape[1], dtype=np.uint8).reshape(shape)
        if row == 2:
            arrays["prompt_embeds"] = text
        np.savez(path, **arrays)
    captions = table.column("caption").to_pylist()
    captions[2] = captions[0]
    at = table.column_names.index("caption")
    pq.write_table(table.set_column(at, "caption", pa.array(captions)), part_of(source))
    np.savez(source / "empty_prompt.npz", prompt_embeds=np.ones((4, text.shape[1]), np.float32))
    if change is not None:
        change(source)
    if LAYOUTS[layout] is None:
        return source
    convert_cache(source, folder / "cache", shard_bytes=8000, **LAYOUTS[layout])
    return folder / "cache"


def part_of(cache: Path) -> Path:
    return sorted(cache.rglob("*.parquet"))[0]


def check(cache: Path, **options: object) -> VerifyReport:
    return verify_cache(load_cache(cache, **options), progress=False)


def rewrite(cache: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    file = part_of(cache)
    pq.write_table(change(pq.read_table(file)), file)


def in_column(name: str, change: Callable[[list], object]) -> Callable[[pa.Table], pa.Table]:
    def apply(table: pa.Table) -> pa.Table:
        values = table.column(name).to_pylist()
        change(values)
        kind = table.schema.field(name).type
        return table.set_column(table.column_names.index(name), name, pa.array(values, kind))

    return apply


def payload_ranges(cache: Path) -> list[tuple[Path, int, int]]:
    """(file, start, end) of stored arrays, found without the library: by zip, safetensors header, or value."""
    found = []
    for file in sorted(cache.rglob("*_latents.npz")):
        with zipfile.ZipFile(file) as archive, file.open("rb") as handle:
            for info in archive.infolist():
                handle.seek(info.header_offset + 26)
                start = info.header_offset + 30 + sum(struct.unpack("<2H", handle.read(4)))
                found.append((file, start, start + info.file_size))
    for file in sorted(cache.rglob("*.safetensors")):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if not name.startswith(("__metadata__", "fill.")):
                found.append((file, *(8 + size + offset for offset in entry["data_offsets"])))
    for file in sorted(cache.rglob("*.parquet")):
        data, table = file.read_bytes(), pq.read_table(file)
        for name in table.column_names:
            if pa.types.is_binary(table.schema.field(name).type):
                for value in table.column(name).to_pylist():
                    start = data.find(struct.pack("<I", len(value)) + value) + 4
                    assert start > 4
                    found.append((file, start, start + len(value)))
    return found


def flip(file: Path, place: int, bit: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(place)
        old = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([old ^ 1 << bit]))


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(layout: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only, or put back as it was."""
    return make(tmp_path_factory.mktemp("whole"), layout)


# -- clean caches, and every kind of damage to the bytes -------------------------------------------------------


def test_a_whole_cache_is_clean(whole: Path, layout: str) -> None:
    report = check(whole)
    assert report.problems == [] and report.warnings == [] and report.clean and report.rows == ROWS
    arrays = 4 * ROWS + ROWS * ("fp8" in layout)
    if layout.startswith("shards"):  # the prompt of rows 0 and 2 is stored, and read, once
        arrays -= 2 + ("fp8" in layout)
    assert report.arrays == arrays
    assert report.bytes == sum(end - start for _, start, end in payload_ranges(whole)) - 128 * (layout == "npz") * 24


def test_every_flipped_bit_is_found(whole: Path, layout: str) -> None:
    ranges, rng = payload_ranges(whole), random.Random(layout)
    cache = load_cache(whole)
    for _ in range(100):
        file, start, end = rng.choices(ranges, [end - start for _, start, end in ranges])[0]
        place, bit = rng.randrange(start, end), rng.randrange(8)
        flip(file, place, bit)
        try:
            report = verify_cache(cache, progress=False)
        finally:
            flip(file, place, bit)
        assert report.bad_rows and {problem.file for problem in report.problems} == {str(file)}, (file, place, bit)
    assert verify_cache(cache, progress=False).clean


def test_flips_outside_of_the_arrays_do_no_unseen_harm(tmp_path: Path) -> None:
    """Headers and directory of a zip: the tensors stay right, or the flip is found."""
    cache = make(tmp_path, "npz")
    opened, file = load_cache(cache), Path(load_cache(cache).payload_path(0))
    expected, rng = opened[0], random.Random(1)
    inside = {place for name, start, end in payload_ranges(cache) if name == file for place in range(start, end)}
    places = [place for place in range(file.stat().st_size) if place not in inside]
    assert len(places) > 300
    found = 0
    for place in rng.sample(places, 200):
        bit = rng.randrange(8)
        flip(file, place, bit)
        report = verify_cache(opened, progress=False)
        if report.clean:
            assert all(torch.equal(opened[0][name], value) for name, value in expected.items())
        else:
            found += 1
            assert report.bad_rows == [0]
        flip(file, place, bit)
    assert found > 60


@pytest.mark.parametrize("damage", ["missing", "cut short", "garbage", "empty"])
@pytest.mark.parametrize("stored", ["npz", "shards"])  # an inline file is its own index: without it there is no cache
def test_one_bad_file_does_not_stop_the_scan(stored: str, damage: str, tmp_path: Path) -> None:
    cache = make(tmp_path, stored)
    opened = load_cache(cache)
    file = Path(opened.payload_path(ROWS - 1))
    rows = [i for i in range(ROWS) if opened.payload_path(i) == str(file)]
    rows += [i for i in range(ROWS) for m in opened.members(i).values() if m.file == str(file)]
    data = file.read_bytes()
    new = {"cut short": data[:-1], "garbage": random.Random(0).randbytes(len(data)), "empty": b""}
    file.unlink() if damage == "missing" else file.write_bytes(new[damage])
    report = verify_cache(opened, progress=False)
    assert report.bad_rows == sorted(set(rows)) and 0 < len(set(rows)) < ROWS
    assert report.bad_files == [str(file)]
    assert all(f"row {problem.row} " in problem.what for problem in report.problems)


def test_nan_inside_is_found(layout: str, tmp_path: Path) -> None:
    """NaN that was there when the checksum was made."""

    def poison(source: Path) -> None:
        file = sorted(source.rglob("*_latents.npz"))[3]
        arrays = dict(np.load(file))
        arrays["latents"][1, 2, 3] = np.nan
        arrays["prompt_embeds"][5, 7] = np.inf
        np.savez(file, **arrays)

    report = check(make(tmp_path, layout, poison))
    assert report.bad_rows == [3]
    texts = " ".join(problem.text for problem in report.problems)
    assert "`latents` holds NaN or Inf: 1 of" in texts
    if "fp8" not in layout:  # there infinity makes the scale of a token infinite
        assert "`prompt_embeds` holds NaN or Inf: 1 of" in texts


@pytest.mark.parametrize("stored", ["npz", "shards", "shards zstd"])
def test_swapped_files_are_found(stored: str, tmp_path: Path) -> None:
    cache = make(tmp_path, stored)
    opened = load_cache(cache)
    files = list(dict.fromkeys(opened.payload_path(i) for i in range(ROWS)))[:2]
    one, two = (Path(file).read_bytes() for file in files)
    Path(files[0]).write_bytes(two)
    Path(files[1]).write_bytes(one)
    touched = {i for i in range(ROWS) if opened.payload_path(i) in files}
    assert set(check(cache).bad_rows) >= touched - {2} and len(touched) > 1


# -- npz: what zip's own reader lets through -------------------------------------------------------------------


def test_local_header_and_directory_must_agree(tmp_path: Path) -> None:
    cache = make(tmp_path, "npz")
    file = Path(load_cache(cache).payload_path(1))
    data = bytearray(file.read_bytes())
    data[14] ^= 1  # CRC in the first local header
    file.write_bytes(data)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
    report = check(cache)
    assert report.bad_rows == [1] and "disagree" in report.problems[0].text


def test_compressed_and_big_endian_arrays_are_checked(tmp_path: Path) -> None:
    cache = make(tmp_path, "npz")
    files = [Path(load_cache(cache).payload_path(i)) for i in (0, 1)]
    np.savez_compressed(files[0], **dict(np.load(files[0])))
    arrays = dict(np.load(files[1]))
    np.savez(files[1], **arrays | {"latents": arrays["latents"].astype(">f4")})
    assert check(cache).clean
    for row, file in enumerate(files):
        data = file.read_bytes()
        flip(file, len(data) // 3, 3)
        assert check(cache).bad_rows == [row]
        file.write_bytes(data)


# -- the index -------------------------------------------------------------------------------------------------


def test_wrong_bucket_channels_and_width(tmp_path: Path) -> None:
    cache = make(tmp_path, "npz")
    rewrite(cache, in_column("bucket_w", lambda values: values.__setitem__(4, values[4] + 8)))
    report = check(cache)
    assert report.bad_rows == [4] and "does not fit `latent_shape`" in report.problems[0].text
    file = Path(load_cache(cache).payload_path(1))
    arrays = dict(np.load(file))
    arrays |= {"latents": arrays["latents"][:3], "prompt_embeds": arrays["prompt_embeds"][:, :40]}
    np.savez(file, **arrays)
    rewrite(cache, in_column("latent_shape", lambda values: values[1].__setitem__(0, 3)))
    rewrite(cache, in_column("prompt_embeds_shape", lambda values: values[1].__setitem__(1, 40)))
    texts = [problem.text for problem in check(cache).problems if problem.row == 1]
    assert texts == [
        "the latents have 3 channels, those of the other rows 4",
        "the text embeddings are 40 wide, those of the other rows 48",
    ]


def test_repeated_rows(layout: str, tmp_path: Path) -> None:
    cache = make(tmp_path, layout)
    if layout.startswith("inline"):
        shutil.copy(part_of(cache), cache / "data_again.parquet")  # sorts before the others
        repeated = [problem.row for problem in check(cache).problems]
        assert repeated == list(range(len(pq.read_table(part_of(cache))), 2 * len(pq.read_table(part_of(cache)))))
        return
    rewrite(cache, lambda table: pa.concat_tables([table, table.slice(1, 1)]))
    report = check(cache)
    last = len(pq.read_table(part_of(cache))) - 1
    assert report.bad_rows == [last] and "earlier row" in report.problems[0].text
    with pytest.raises(CacheError, match="same sample twice"):
        load_cache(cache).row_ids  # noqa: B018


def test_masks_and_dtype(tmp_path: Path) -> None:
    cache = make(tmp_path, "npz")
    file = Path(load_cache(cache).payload_path(3))
    arrays = dict(np.load(file))
    np.savez(file, **arrays | {"loss_mask": arrays["loss_mask"][:-1]})
    assert [p.row for p in check(cache).problems if "`loss_mask` has shape" in p.text] == [3]
    np.savez(file, **arrays | {"latents_std": -np.ones_like(arrays["latents"])})
    assert [p.row for p in check(cache).problems if "negative" in p.text] == [3]
    np.savez(file, **arrays)

    def say(table: pa.Table) -> pa.Table:
        facts = json.loads(table.schema.metadata[b"sciflow_hf"]) | {"dtype": "bf16"}
        return table.replace_schema_metadata({b"sciflow_hf": json.dumps(facts).encode()})

    rewrite(cache, say)
    report = check(cache)
    assert report.bad_rows == [] and not report.clean
    assert "`dtype` is 'bf16', but `latents` is stored as F32 in 6 rows" in report.problems[0].text


def test_empty_prompt_and_unused_shards(tmp_path: Path) -> None:
    cache = make(tmp_path, "shards")
    shutil.copy(next(cache.rglob("*.safetensors")), cache / "shards" / "left_over.safetensors")
    report = check(cache)
    assert report.clean and len(report.warnings) == 1 and "left_over" in report.warnings[0]
    np.savez(cache / "empty_prompt.npz", prompt_embeds=np.ones((4, 7), np.float32))
    assert [(p.row, "(4, 7)" in p.text) for p in check(cache).problems] == [(None, True)]
    np.savez(cache / "empty_prompt.npz", prompt_embeds=np.full((4, 48), np.nan, np.float32))
    assert ["NaN" in p.text for p in check(cache).problems] == [True]


def test_checksums_come_from_the_index(tmp_path: Path) -> None:
    cache = make(tmp_path, "shards")
    for file in cache.glob("*.parquet"):
        table = pq.read_table(file)
        zeros = pa.array([0] * len(table), pa.int64())
        pq.write_table(table.set_column(table.column_names.index("latents_crc32"), "latents_crc32", zeros), file)
    assert check(cache).bad_rows == list(range(ROWS))


def test_views_threads_and_unreadable_indexes(tmp_path: Path) -> None:
    cache = make(tmp_path, "shards")
    ranges = payload_ranges(cache)
    flip(ranges[0][0], ranges[0][1], 0)
    opened = load_cache(cache)
    reports = [verify_cache(opened, threads=threads, progress=False) for threads in (1, 4)]
    assert reports[0] == reports[1] and len(reports[0].bad_rows) == 1
    assert verify_cache(opened.select([5, 4, *reports[0].bad_rows]), progress=False).bad_rows == [2]
    with pytest.raises(SciflowError, match="`threads` is 0"):
        verify_cache(opened, threads=0)
    part_of(cache).write_bytes(b"PAR1")
    with pytest.raises(CacheError, match="cannot be read as parquet"):
        check(cache)


# -- repair ----------------------------------------------------------------------------------------------------


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)).hexdigest()


def test_a_repaired_index_is_clean(whole: Path, layout: str, tmp_path: Path) -> None:
    cache = shutil.copytree(whole, tmp_path / "cache")
    file, start, _ = next(r for r in payload_ranges(cache) if r[0] == Path(load_cache(cache).payload_path(ROWS - 1)))
    flip(file, start + 1, 2)
    opened = load_cache(cache)
    bad = verify_cache(opened, progress=False).bad_rows
    before = digest(cache)
    folder, root = write_repaired(opened, str(cache), bad)
    assert folder == tmp_path / "cache-repaired" and Path(root) == cache and digest(cache) == before
    assert write_repaired(opened, str(cache), bad) == (folder, root), "once more does no harm"

    repaired = load_cache(folder, payload_dir=root)
    assert verify_cache(repaired, progress=False).clean
    kept = [i for i in range(ROWS) if i not in bad]
    assert 0 < len(kept) < ROWS and len(repaired) == len(kept) and repaired.metadata == opened.metadata
    assert repaired.row_ids == [opened.row_ids[i] for i in kept] and repaired.captions[0] == opened.captions[kept[0]]
    for new, old in enumerate(kept):
        assert all(torch.equal(value, opened[old][name]) for name, value in repaired[new].items())
    assert repaired.empty_prompt is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "cache-repaired"]

    with pytest.raises(SciflowError, match="holds something else"):
        write_repaired(opened, str(cache), [*bad, kept[0]])
    with pytest.raises(SciflowError, match="leave nothing"):
        write_repaired(opened, str(cache), range(ROWS))
    with pytest.raises(SciflowError, match="local folder"):
        write_repaired(opened, "memory://cache", bad)


def test_paths_rooted_beside_their_index_are_rebased(tmp_path: Path) -> None:
    """Payloads beside their index file, in two folders: one `--payload_dir` serves both."""
    for year in ("2015", "2016"):
        write_cache(tmp_path / "old" / year / "x", buckets=BUCKETS, year=year)
        shutil.move(tmp_path / "old" / year / "x" / year, tmp_path / "old" / year / year)
        shutil.move(part_of(tmp_path / "old" / year / year), tmp_path / "old" / year / "index.parquet")
    opened = load_cache(tmp_path / "old")
    folder, root = write_repaired(opened, str(tmp_path / "old"), [0, 7])
    repaired = load_cache(folder, payload_dir=root)
    assert verify_cache(repaired, progress=False).clean and len(repaired) == 10
    assert torch.equal(repaired[6]["latents"], opened[8]["latents"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cache_goes_to_processes_that_are_not_forked(layout: str, tmp_path: Path) -> None:
    """Also after a check, which keeps what it read of the headers."""
    cache = load_cache(make(tmp_path, layout))
    assert verify_cache(cache, progress=False).clean
    copy = pickle.loads(pickle.dumps(cache))
    for mine, sent in zip((cache[i] for i in range(ROWS)), (copy[i] for i in range(ROWS)), strict=True):
        assert mine.keys() == sent.keys() and all(
            torch.equal(mine[n], sent[n]) for n in mine if isinstance(mine[n], torch.Tensor)
        )
    assert verify_cache(copy, progress=False).clean
