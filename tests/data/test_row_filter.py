"""Row filters: which rows of every kind of input and cache they keep, and what is said of conditions that are wrong."""

import csv
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import sciforma
from builds import build, picture, write_notes

from sciflow_hf.cli import main
from sciflow_hf.data.build.sources.find import find_records
from sciflow_hf.data.build.sources.record import Record
from sciflow_hf.data.cache import LatentCache
from sciflow_hf.data.load import load_cache
from sciflow_hf.data.row_filter import RowFilter
from sciflow_hf.data.stream.stream import StreamingCache
from sciflow_hf.errors import SciflowError

pytestmark = pytest.mark.usefixtures("datasets_cache")
TABLE = {"tier": ["High", "Low", None, "Low"], "year": [2019, 2020, 2021, None], "tikz": [True, False, False, None]}


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        (["tier=High"], [0]),
        (["tier=High,Low", "tikz=false"], [1]),
        (["tier=none"], [2]),
        (["tier=High, none"], [0, 2]),
        (["year>=2020"], [1, 2]),
        (["year >= 2019.5", "year<=2020"], [1]),
        (["year=2019.0"], [0]),
        (["tikz=TRUE,none"], [0, 3]),
        (["nowhere=none"], [0, 1, 2, 3]),
    ],
)
def test_conditions(conditions: list[str], kept: list[int]) -> None:
    """Of lists, as metadata files give them, and of tables."""
    for columns in (TABLE, dict(zip(TABLE, pa.table(TABLE).columns, strict=True))):
        assert np.flatnonzero(RowFilter(conditions).mask(columns, 4)).tolist() == kept


def test_texts_are_compared_as_they_stand() -> None:
    """Numbers in texts too: identifiers may end in zeros; truth values of a CSV have any capitals."""
    columns = {"paper": ["2401.10", "2401.1"], "tikz": ["False", "true"], "year": ["2019", "2021"]}
    assert RowFilter(["paper=2401.10"]).mask(columns, 2).tolist() == [True, False]
    assert RowFilter(["tikz=false"]).mask(columns, 2).tolist() == [True, False]
    assert RowFilter(["year>=2020"]).mask(columns, 2).tolist() == [False, True]
    assert RowFilter(['paper="a,b",2401.1']).mask({"paper": ["a,b", "b"]}, 2).tolist() == [True, False]


@pytest.mark.parametrize("text", ["tier", "=High", "tier=", "tier=High,,Low", "year>=a", "year>=1,2", "year>3", "a!=b"])
def test_texts_that_are_no_condition(text: str) -> None:
    with pytest.raises(SciflowError, match=r"`row_filter` .*Write COLUMN=VALUE|no condition|takes one number"):
        RowFilter([text])


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (["tear=High"], r"has no column 'tear', but 'tier', 'year', 'tikz'\.$"),
        (["tier=Hihg"], r"no row of `x` has 'Hihg' in 'tier'\. Its values \(and rows\): Low \(2\), High \(1\), none"),
        (["tier=High", "year>=2020"], r"tier=High year>=2020 leaves none of the 4 rows of `x`"),
        (["tier>=3"], r"'tier' holds 'High', which is no number"),
    ],
)
def test_conditions_that_do_not_fit(conditions: list[str], message: str) -> None:
    row_filter = RowFilter(conditions)
    with pytest.raises(SciflowError, match=message):
        row_filter.mask(TABLE, 4)
        row_filter.close("`x`", TABLE)


def test_columns_of_lists_are_refused() -> None:
    for column in ([[1]], pa.chunked_array([[[1]]])):
        with pytest.raises(SciflowError, match=r"'boxes' holds no single texts"):
            RowFilter(["boxes=1"]).mask({"boxes": column}, 1)


# --- every form of input ---

FILTER = ["quality_tier=High,Medium", "is_tikz=false"]
KEPT = [row for row in range(sciforma.ROWS) if sciforma.TIERS[row % 4] != "Low" and row % 5]


def _rows() -> list[dict[str, Any]]:
    table = sciforma.columns("generation")
    return [{name: values[row] for name, values in table.items()} for row in range(sciforma.ROWS)]


def _folder(folder: Path) -> Path:
    folder.mkdir()
    for row in range(sciforma.ROWS):
        picture(32, 48, (row, 0, 0)).save(folder / f"{row}.png")
    picture(32, 48).save(folder / "plain.png")
    (folder / "plain.txt").write_text("not in the metadata")
    return folder


def _jsonl(folder: Path) -> Path:
    write_notes(_folder(folder), [{"file_name": f"{i}.png", **row} for i, row in enumerate(_rows())])
    return folder


def _csv(folder: Path) -> Path:
    with (_folder(folder) / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", *_rows()[0]])
        writer.writeheader()
        writer.writerows({"file_name": f"{i}.png", **row} for i, row in enumerate(_rows()))
    return folder


def _saved(folder: Path) -> Path:
    data = datasets.load_dataset("parquet", data_files=str(sciforma.parquet(folder / "in") / "*.parquet"))["train"]
    data.save_to_disk(folder / "saved")
    return folder / "saved"


FORMS: dict[str, Callable[[Path], Path]] = {
    "jsonl": _jsonl, "csv": _csv, "parquet": sciforma.parquet, "files": sciforma.files, "saved": _saved,
}  # fmt: skip


def _captions(records: list[Record]) -> list[str]:
    return sorted(record.caption for record in records)


@pytest.mark.parametrize("form", FORMS)
def test_every_input_is_filtered(tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    source = FORMS[form](tmp_path / "in")
    split = "gen_768" if form == "files" else None
    everything = find_records(source, split=split)[0]
    with caplog.at_level(logging.INFO):
        records, tally = find_records(source, split=split, row_filter=RowFilter(FILTER))
    captions = sciforma.columns("generation")["caption"]
    assert _captions(records) == sorted(captions[row] for row in KEPT)
    before = {record.caption: record.name for record in everything}
    assert all(before[record.caption] == record.name for record in records), "a filter renames no row"
    others = form in ("jsonl", "csv")  # a captioned image that the metadata do not list
    assert re.search(rf"{len(KEPT)} of {20 + others} rows of `input_dir` .* are used", caplog.text)
    if tally.unit == "rows":
        assert len(tally.remarks["rows left out by `--row_filter`"]) == 20 - len(KEPT)
    else:
        left_out = [name for name, reason in tally.ignored.items() if reason == "left out by `--row_filter`"]
        assert len(left_out) == 20 - len(KEPT) + 2 * others and not tally.missing and not tally.skipped
    with pytest.raises(SciflowError, match=r"`row_filter` 'quality=High': `input_dir` .* has no column 'quality', but"):
        find_records(source, split=split, row_filter=RowFilter(["quality=High"]))
    with pytest.raises(SciflowError, match=r"no row of `input_dir` .* has 'high'.*High \(10\)"):
        find_records(source, split=split, row_filter=RowFilter(["quality_tier=high"]))


def test_the_table_of_a_filtered_build_adds_up(tmp_path: Path) -> None:
    report = build(_jsonl(tmp_path / "in"), tmp_path / "cache", row_filter=FILTER, strict=True)
    assert report.samples == len(KEPT) == report.tally.images
    assert report.tally.files == sum(file.is_file() for file in (tmp_path / "in").iterdir())


def test_edits_of_the_hub_are_filtered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = datasets.load_dataset("parquet", data_files=str(sciforma.parquet(tmp_path / "in", "editing") / "*.parquet"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *address: data)
    records, _ = find_records("user/figures:editing", row_filter=RowFilter(["paper_id=2401.00003", "bucket_w>=96"]))
    assert [record.name for record in records] == ["row_00000006"]
    assert records[0].source_names == ("row_00000006/source_image",)
    assert records[0].image.read() == sciforma.png(sciforma.drawing(6, edited=True))


# --- caches ---


@pytest.fixture(scope="module", params=["npz", "shards", "inline"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    source = _jsonl(folder / "in")
    options = {"payload": request.param, "dtype": "fp32", "samples_per_part": 6}
    build(source, folder / "cache", split=None, **options)
    return folder / "cache"


def test_a_cache_is_filtered(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    everything = load_cache(cache)
    with caplog.at_level(logging.INFO):
        found = load_cache(cache, row_filter=FILTER)
    assert isinstance(everything, LatentCache) and isinstance(found, LatentCache)
    expected = [row for row, name in enumerate(everything.row_ids) if name in {f"{i}.png" for i in KEPT}]
    assert found.row_ids == [everything.row_ids[row] for row in expected] and len(found) == len(KEPT)
    assert f"{len(KEPT)} of 21 rows of `dataset_dir` are used, {21 - len(KEPT)} are left out" in caplog.text
    assert found.fingerprint == everything.select(expected).fingerprint != everything.fingerprint
    assert found.row_filter == found.select([0]).row_filter == tuple(FILTER)
    assert not set(found.split(0.3)[1].row_ids) - set(everything.split(0.3)[1].row_ids), "the split stays"


def test_a_stream_is_filtered(cache: Path) -> None:
    found, stream = load_cache(cache, row_filter=FILTER), load_cache(cache, streaming=True, row_filter=FILTER)
    assert isinstance(found, LatentCache) and isinstance(stream, StreamingCache)
    everything = load_cache(cache, streaming=True)
    assert len(stream) == len(KEPT) and len(everything) == 21 and stream.fingerprint != everything.fingerprint

    def colours(samples: Any) -> list[float]:
        return sorted(float(sample["latents"].mean()) for sample in samples)

    assert colours(stream) == colours(found[i] for i in range(len(found)))
    held = {fraction: (found.split(fraction), stream.split(fraction)) for fraction in (0.0, 0.3)}
    for (train, _), (streamed, _) in held.values():
        assert colours(streamed) == colours(train[i] for i in range(len(train))) and len(streamed) == len(train)
    last = StreamingCache(cache, row_filter=["caption=generation 19: a plot"])  # none of the first files has such a row
    assert len(last) == 1 and "19.png" in last.first().describe(0)
    with pytest.raises(SciflowError, match=r"`dataset_dir` has no column 'x', but .*'quality_tier'"):
        load_cache(cache, streaming=True, row_filter=["x=1"])


def test_several_caches_of_which_one_lacks_the_column(cache: Path, tmp_path: Path) -> None:
    """Tier High of one, and all of another, in one condition."""
    folder = tmp_path / "in"
    folder.mkdir()
    picture(32, 48).save(folder / "a.png")
    write_notes(folder, [{"file_name": "a.png", "caption": "x"}])
    layout = "npz" if (cache / "shards").exists() else "shards"  # any layouts go together
    build(folder, tmp_path / "other", payload=layout, dtype="fp32")
    for streaming in (False, True):
        found = load_cache([cache, tmp_path / "other"], streaming=streaming, row_filter=["quality_tier=High,none"])
        assert len(found) == 10 + 2, "the image that the metadata do not list has no tier either"


def test_a_converted_cache_holds_what_the_filter_keeps(cache: Path, tmp_path: Path) -> None:
    words = ["cache", "convert", "--input_dir", str(cache), "--output_dir", str(tmp_path / "new")]
    main([*words, "--row_filter", *FILTER])
    new, old = load_cache(tmp_path / "new"), load_cache(cache, row_filter=FILTER)
    assert isinstance(new, LatentCache) and isinstance(old, LatentCache)
    assert new.row_ids == old.row_ids and new.strings("quality_tier") == old.strings("quality_tier")


# --- given buckets ---


@pytest.mark.parametrize("form", ["parquet", "files", "older"])
def test_given_buckets(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "in"
    source = sciforma.parquet(folder) if form == "parquet" else sciforma.files(folder, older=form == "older")
    split = None if form == "parquet" else "gen_768"
    build(source, tmp_path / "cache", split=split, resolution=16, buckets="given")
    cache = load_cache(tmp_path / "cache")
    assert isinstance(cache, LatentCache) and len(cache) == 20
    expected = sciforma.columns("generation")
    sizes = dict(zip(expected["caption"], zip(expected["bucket_h"], expected["bucket_w"], strict=True), strict=True))
    assert {text: sizes[text] for text in cache.captions} == dict(zip(cache.captions, cache.buckets, strict=True))
    with pytest.raises(SciflowError, match=r"other settings.*buckets"):
        build(source, tmp_path / "cache", split=split, resolution=16)


def test_buckets_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "in")
    values: list[Any] = [48, "48", 48.0, None, 47, -48, "wide", float("nan")]
    rows = [{"file_name": f"{i}.png", "caption": "x", "bucket_w": w, "bucket_h": 32} for i, w in enumerate(values)]
    write_notes(folder, rows)
    for name in ["plain", *range(len(values), 20)]:
        (folder / f"{name}.png").unlink()
    (folder / "plain.txt").unlink()
    report = build(folder, tmp_path / "cache", buckets="given")
    assert report.samples == 3
    shown = ["None", "47", "-48", "'wide'", "nan"]
    reasons = {f"{i}.png": f"its `bucket_w` is {text}, but must be a positive multiple of 8 pixels"
               for i, text in enumerate(shown, 3)}  # fmt: skip
    assert dict(report.skipped) == reasons
    with pytest.raises(SciflowError, match=r"3\.png.*`bucket_w` is None"):
        build(folder, tmp_path / "strict", buckets="given", strict=True)
    write_notes(folder, [{"file_name": "0.png", "caption": "x", "year": 1}])
    with pytest.raises(SciflowError, match=r"`buckets` given: .* have no columns `bucket_w` and `bucket_h`.*'year'"):
        build(folder, tmp_path / "none", buckets="given")
