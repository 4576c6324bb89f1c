"""Benchmarks by name: SciFormaBench as rows, from tables with its published columns."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sciflow_hf.data.benchmarks import SCIFORMA, load_benchmark
from sciflow_hf.errors import SciflowError
from sciflow_hf.metrics.judge.answers import picture
from sciflow_hf.metrics.judge.rubric import COLUMNS, elements_of

RUBRIC = {
    "rubric_components": [{"name": "encoder", "description": "a box"}],
    "rubric_arrows": [{"source": "encoder", "target": "decoder", "label": ""}],
    "rubric_text": [{"text": "Encoder", "location": "left"}, {"text": "Decoder", "location": "right"}],
}


def png(number: int) -> bytes:
    Image.new("RGB", (6 + number, 4)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def table(level: str, rows: int) -> dict[str, list[Any]]:
    return {
        "prompt": [f"{level} figure {i}" for i in range(rows)],
        "width": [768] * rows,
        "height": [512 + 16 * i for i in range(rows)],
        "gt_image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(rows)],
        "image_path": [f"{level}/{i}.png" for i in range(rows)],
        "year": ["2025"] * rows,
        **{name: [json.dumps(elements)] * rows for name, elements in RUBRIC.items()},
    }


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for level, rows in {"hard": 2, "simple": 3}.items():
        (tmp_path / "bench" / level).mkdir(parents=True)
        pq.write_table(pa.table(table(level, rows)), tmp_path / "bench" / level / "test-00000-of-00001.parquet")
    return tmp_path / "bench"


def test_rows_of_a_local_copy(copy: Path) -> None:
    pq.write_table(pa.table({"other": [1]}), copy / "simple" / "train-00000-of-00001.parquet")
    rows = load_benchmark(str(copy))
    assert [(row["level"], row["number"], row["seed"], row["height"]) for row in rows] == [
        *[("simple", i, 42 + i, 512 + 16 * i) for i in range(3)],
        *[("hard", i, 42 + i, 512 + 16 * i) for i in range(2)],  # seeds begin anew
    ]
    assert rows[4]["prompt"] == "hard figure 1" and rows[4]["width"] == 768 and rows[4]["image_path"] == "hard/1.png"
    assert {(row["num_inference_steps"], row["guidance_scale"]) for row in rows} == {(50, 4.0)}
    assert picture(rows[2]["reference"]).size == (8, 4)
    found = {axis: elements_of(rows[0][column], axis, "row 0") for axis, column in COLUMNS.items()}
    assert found == {
        "component": ["encoder: a box"],
        "arrow": ["encoder -> decoder"],
        "text": ['"Encoder" (left)', '"Decoder" (right)'],  # the axis that the published loader lost
    }
    assert load_benchmark(str(copy / "hard" / "test-00000-of-00001.parquet"))[1] == {**rows[4], "level": "hard"}
    assert load_benchmark(str(copy / "hard")) == rows[3:]


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, level: str, *, split: str) -> datasets.Dataset:
        asked.append((name, level, split))
        return datasets.Dataset.from_dict(table(level, 2)).cast_column("gt_image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [row["level"] for row in load_benchmark("sciforma")] == ["simple"] * 2 + ["medium"] * 2 + ["hard"] * 2
    assert asked == [(SCIFORMA, level, "test") for level in ("simple", "medium", "hard")]
    (first, second) = load_benchmark("sciforma:medium")
    assert (
        second["seed"] == 43
        and second["reference"] == png(1)
        and first["rubric_text"] == json.dumps(RUBRIC["rubric_text"])
    )


def test_what_is_no_benchmark(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SciflowError, match=r"'sciform' is unknown: use sciforma, sciforma:simple.*as prompts"):
        load_benchmark("sciform")
    with pytest.raises(SciflowError, match=r"has no rows in the split 'train'"):
        load_benchmark(str(copy), split="train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SciflowError, match=r"holds no parquet files: give a copy of microsoft"):
        load_benchmark(str(tmp_path / "empty"))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(SciflowError, match=r"torn/test.parquet cannot be read as parquet"):
        load_benchmark(str(tmp_path / "torn"))
    pq.write_table(pa.table({"prompt": ["a"], "width": [1]}), tmp_path / "torn" / "test.parquet")
    with pytest.raises(SciflowError, match=r"has no height, gt_image, rubric_components, .*only prompt, width"):
        load_benchmark(str(tmp_path / "torn"))

    def fail(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(SciflowError, match=r"SciFormaBench \(hard, split 'test'\) cannot be loaded \(no route\)"):
        load_benchmark("sciforma:hard")
