"""Streams of broken caches: what is wrong, where, and what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caches import write_cache

from sciflow_hf.data.load import load_cache
from sciflow_hf.data.stream.loader import StreamLoader
from sciflow_hf.data.stream.stream import StreamingCache
from sciflow_hf.errors import CacheError, SciflowError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache of 24 rows in two index files, 2015_rank0_part{0,1}.parquet."""
    return write_cache(tmp_path / "cache", parts=2, settings={"family": "flux2_klein"})


def change(folder: Path, part: int, edit: Callable[[pa.Table], pa.Table]) -> Path:
    file = folder / "2015" / f"2015_rank0_part{part}.parquet"
    pq.write_table(edit(pq.read_table(file)), file)
    return file


def set_value(name: str, row: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    def edit(table: pa.Table) -> pa.Table:
        values = table.column(name).to_pylist()
        values[row] = value
        column = pa.array(values, table.schema.field(name).type)
        return table.set_column(table.column_names.index(name), name, column)

    return edit


def run(folder: Path, **options: Any) -> None:
    loader = StreamLoader(StreamingCache(folder, **options), batch_size=1)
    batches = iter(loader)
    try:
        for _ in range(24):
            next(batches)
    finally:
        loader.close()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"`dataset_dir` is '.*/none', which does not exist"):
        StreamingCache(tmp_path / "none")
    with pytest.raises(CacheError, match=r"holds no index \(\*\.parquet\)"):
        StreamingCache(tmp_path)
    with pytest.raises(CacheError, match="is an empty list"):
        StreamingCache([])


def test_options_out_of_range(folder: Path) -> None:
    with pytest.raises(SciflowError, match="`shuffle_buffer` is -1"):
        StreamingCache(folder, shuffle_buffer=-1)
    for weights in ([0], [-1], [1, 2]):
        with pytest.raises(SciflowError, match="one number above 0 for each of 1 caches"):
            StreamingCache(folder, weights=weights)


def test_a_file_named_twice(folder: Path) -> None:
    with pytest.raises(CacheError, match=r"names .*part0.parquet twice"):
        StreamingCache([folder, folder])


def test_parts_with_other_columns(folder: Path) -> None:
    change(folder, 1, lambda table: table.append_column("note", pa.array(["x"] * len(table))))
    with pytest.raises(CacheError, match=r"part0.parquet and .*part1.parquet do not have the same columns.*'note'"):
        StreamingCache(folder)


def test_parts_with_other_settings(folder: Path) -> None:
    other = {b"sciflow_hf": json.dumps({"family": "sd3"}).encode()}
    change(folder, 1, lambda table: table.replace_schema_metadata(other))
    with pytest.raises(CacheError, match=r"not made with the same settings: `family` is 'flux2_klein' and 'sd3'"):
        StreamingCache(folder)


def test_a_column_that_is_missing(folder: Path) -> None:
    for part in (0, 1):
        change(folder, part, lambda table: table.drop_columns(["bucket_h"]))
    with pytest.raises(CacheError, match="lacks the column 'bucket_h'"):
        StreamingCache(folder)


def test_no_rows(folder: Path) -> None:
    for part in (0, 1):
        change(folder, part, lambda table: table.slice(0, 0))
    with pytest.raises(CacheError, match="holds no samples"):
        StreamingCache(folder)


def test_one_index_file_without_rows(folder: Path) -> None:
    change(folder, 0, lambda table: table.slice(0, 0))
    stream = StreamingCache(folder)
    assert len(stream) == len(list(stream)) == 12
    assert stream.describe(0) == load_cache(folder).describe(0)


@pytest.mark.parametrize(
    "column, value, needed",
    [
        ("bucket_w", 0, "a positive number of pixels"),
        ("bucket_w", None, "given"),
        ("latent_shape", [4, 8], "3 positive whole numbers"),
        ("prompt_embeds_shape", [12, 0], "2 positive whole numbers"),
    ],
)
def test_a_value_that_cannot_be(folder: Path, column: str, value: Any, needed: str) -> None:
    change(folder, 1, set_value(column, 5, value))
    with pytest.raises(CacheError, match=rf"Row 17 \(in .*part1.parquet\): column `{column}` is .*{needed}"):
        run(folder)


@pytest.mark.parametrize("path", ["../secret.npz", "/etc/passwd", "2015/../../x.npz"])
@pytest.mark.parametrize("row", [0, 7])
def test_a_path_that_leads_outside(folder: Path, path: str, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sciflow_hf.data.stream.index._PIECE", 5)
    (folder.parent / "secret.npz").touch()
    change(folder, 1, set_value("cache_path", row, path))
    with pytest.raises(CacheError, match=rf"Row {12 + row} \(in .*part1.parquet\): column `cache_path`.*lies outside"):
        run(folder)


def test_two_shapes_in_a_bucket(folder: Path) -> None:
    change(folder, 1, set_value("latent_shape", 0, [4, 9, 12]))
    row = pq.read_table(folder / "2015" / "2015_rank0_part1.parquet").to_pylist()[0]
    bucket = rf"\({row['bucket_h']}, {row['bucket_w']}, 12\)"
    with pytest.raises(CacheError, match=rf"row \d+ .* and row \d+ .* share the bucket {bucket}.*\(4, 9, 12, 12, 48\)"):
        run(folder, shuffle_buffer=0)


def test_payloads_elsewhere(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "payloads"
    shutil.copytree(folder, moved)
    for paper in (folder / "2015").iterdir():
        if paper.is_dir():
            shutil.rmtree(paper)
    with pytest.raises(CacheError, match=r"The payloads of .*part\d.parquet are missing.*`--payload_dir`"):
        run(folder)
    run(folder, payload_dir=moved)


def test_a_broken_payload_names_row_and_file(folder: Path) -> None:
    cache = load_cache(folder)
    file = Path(cache.payload_path(13))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CacheError, match=rf"row 13 \(.*{file.name}.*part1.parquet.*truncated or broken"):
        run(folder)


def test_a_broken_index(folder: Path) -> None:
    file = folder / "2015" / "2015_rank0_part1.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(CacheError, match=r"The index .*part1.parquet cannot be read as parquet"):
        StreamingCache(folder)
    file.write_bytes(b"PAR1" + bytes(len(whole) - 1000) + whole[len(whole) - 996 :])
    with pytest.raises(CacheError, match=r"The index .*part1.parquet cannot be read as parquet"):
        run(folder)


def test_an_index_that_breaks_in_the_middle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sciflow_hf.data.stream.index._PIECE", 3)
    file = folder / "2015" / "2015_rank0_part1.parquet"
    pq.write_table(pq.read_table(file), file, row_group_size=3, compression="NONE", use_dictionary=False)
    third = pq.read_metadata(file).row_group(2)
    start = min(third.column(i).data_page_offset for i in range(third.num_columns))
    with file.open("r+b") as handle:
        handle.seek(start)
        handle.write(b"\xff" * third.total_byte_size)
    with pytest.raises(CacheError, match=r"The index .*part1.parquet cannot be read as parquet from its row [036] on"):
        run(folder, shuffle_buffer=0)


def test_captions_that_are_not_there(folder: Path) -> None:
    for part in (0, 1):
        change(folder, part, lambda table: table.drop_columns(["caption"]))
    stream = StreamingCache(folder)
    stream.online_text = lambda captions: {}
    with pytest.raises(CacheError, match=r"has no captions \(column `caption` or `text`\)"):
        next(iter(stream))
