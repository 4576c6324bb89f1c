"""`sciflow-hf prefer score`: columns of scores, kept by content, with every failure named."""

import csv
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sciflow_hf.cli.main import main
from sciflow_hf.demo.mini_figures import make_mini_figures, mini_figures
from sciflow_hf.metrics.rewards import chart

ASKED: list[str] = []  # prompts that a reward was asked about


def length(prompts: Sequence[str], images: Sequence[Image.Image]) -> list[float]:
    ASKED.extend(prompts)
    return [float(len(prompt)) for prompt in prompts]


def stops(prompts: Sequence[str], images: Sequence[Image.Image], file_name: Sequence[str]) -> list[float]:
    """Is killed at the fourth image."""
    if "00003.png" in file_name:
        raise KeyboardInterrupt
    ASKED.extend(file_name)
    return [1.0] * len(images)


def toned(prompts: Sequence[str], images: Sequence[Image.Image], tone: Sequence[Any], **others: Any) -> list[float]:
    ASKED.extend(others["file_name"])
    return [float(value) for value in tone]


def flaky(prompts: Sequence[str], images: Sequence[Image.Image], file_name: Sequence[str]) -> list[float]:
    """Fails at the second image when it is asked for the first time."""
    ASKED.extend(file_name)
    if "00001.png" in file_name and ASKED.count("00001.png") <= 2:
        raise RuntimeError("busy")
    return [1.0] * len(images)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    figures = list(mini_figures(6, seed=3, sizes=[(64, 96)]))
    return make_mini_figures(tmp_path_factory.mktemp("drawn") / "figures", figures)


@pytest.fixture
def folder(drawn: Path, tmp_path: Path) -> Path:
    ASKED.clear()
    return Path(shutil.copytree(drawn, tmp_path / "figures"))


def score(source: Path, *flags: str, status: int = 0) -> None:
    where = ["--input_dir" if source.is_dir() else "--table", str(source)]
    assert main(["prefer", "score", *where, "--batch_size", "2", *flags]) == status


def table(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def test_columns_are_added(folder: Path) -> None:
    before = table(folder)
    score(folder, "--reward", "chart_kind", f"{__name__}.length", "--reward_weights", "1", "-0.25")
    after = table(folder)
    kinds = chart.chart_kind([r["caption"] for r in before], [Image.open(folder / r["file_name"]) for r in before])
    for row, old, kind in zip(after, before, kinds, strict=True):
        number = float(len(old["caption"]))
        assert row == old | {"chart_kind": kind, "length": number, "reward": kind - 0.25 * number}
    assert [row["caption"] for row in before] == ASKED


def test_scores_are_kept_by_content(folder: Path, tmp_path: Path) -> None:
    """A further reward, other weights, a moved folder and new names of the files score nothing again."""
    name = f"{__name__}.length"
    score(folder, "--reward", name)
    first = table(folder)
    score(folder, "--reward", name, "blank", "--reward_weights", "2", "1")
    assert len(ASKED) == 6 and [row["reward"] for row in table(folder)] == [2 * row["length"] + 1 for row in first]
    moved = folder.rename(tmp_path / "moved")
    rows = table(moved)
    for row in rows:
        (moved / row["file_name"]).rename(moved / f"a{row['file_name']}")
        row["file_name"] = f"a{row['file_name']}"
    rows[1]["caption"] += " again"
    (moved / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Image.new("RGB", (8, 8)).save(moved / rows[2]["file_name"])
    score(moved, "--reward", name)
    assert ASKED[6:] == [rows[1]["caption"], rows[2]["caption"]]


def test_columns_that_a_reward_takes_decide_its_score(folder: Path) -> None:
    rows = [row | {"tone": i, "group_id": "a"} for i, row in enumerate(table(folder))]
    for changed in (None, 4):
        if changed is not None:
            rows[changed]["tone"] = 9
        rows = [row | {"seed": changed} for row in rows]  # which names an image
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        score(folder, "--reward", f"{__name__}.toned", "chart_kind")
    assert [row["toned"] for row in table(folder)] == [0, 1, 2, 3, 9, 5]
    assert ASKED[6:] == [rows[4]["file_name"]]


def test_a_killed_command_continues(folder: Path) -> None:
    """At most a batch is lost, nothing is written before the end, and a broken file of kept scores costs its own."""
    before = (folder / "metadata.jsonl").read_bytes()
    score(folder, "--reward", f"{__name__}.stops", status=130)
    assert ASKED == ["00000.png", "00001.png"] and (folder / "metadata.jsonl").read_bytes() == before
    ASKED.clear()
    (folder / "00003.png").rename(folder / "new.png")
    text = before.decode().replace("00003.png", "new.png")
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    score(folder, "--reward", f"{__name__}.stops")
    assert ASKED == ["00002.png", "new.png", "00004.png", "00005.png"]
    kept = folder / ".metadata.jsonl.scores"
    assert [file.name for file in kept.iterdir()] == ["all.json"]
    (kept / "all.json").write_text("{", encoding="utf-8")
    score(folder, "--reward", f"{__name__}.stops")
    assert len(ASKED) == 10 and [row["stops"] for row in table(folder)] == [1.0] * 6


def test_a_broken_image_is_named_and_has_no_reward(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "00002.png").write_bytes((folder / "00002.png").read_bytes()[:60])
    for _ in range(2):  # it is tried again, the others are not
        with caplog.at_level(logging.WARNING):
            score(folder, "--reward", f"{__name__}.length", "blank")
        assert "`reward` length failed on 00002.png (unreadable image" in caplog.text
        caplog.clear()
        rows = table(folder)
        assert [row["reward"] is None for row in rows] == [i == 2 for i in range(6)] and rows[2]["length"] is None
    assert len(ASKED) == 5


def test_a_score_that_failed_is_asked_for_again(folder: Path) -> None:
    score(folder, "--reward", f"{__name__}.flaky")
    assert [row["flaky"] for row in table(folder)] == [1, None, 1, 1, 1, 1]
    ASKED[:] = ["00001.png"] * 2
    score(folder, "--reward", f"{__name__}.flaky")
    assert ASKED[2:] == ["00001.png"] and [row["reward"] for row in table(folder)] == [1.0] * 6


def test_tables_of_every_kind(folder: Path, tmp_path: Path) -> None:
    """Types and schema of a parquet file stay; the names of the images lead from the new table to them."""
    rows = table(folder)
    given = pa.Table.from_pylist(
        [{"n": i, "raw": b"x", **row} for i, row in enumerate(rows)],
        schema=pa.schema(
            [("n", pa.int16()), ("raw", pa.binary()), *((name, pa.string()) for name in rows[0])], {"made": "by hand"}
        ),
    )
    pq.write_table(given, folder / "table.parquet")
    score(folder / "table.parquet", "--reward", "blank", "--output_file", str(tmp_path / "other" / "scored.parquet"))
    found = pq.read_table(tmp_path / "other" / "scored.parquet")
    assert found.schema.field("n").type == pa.int16() and found.schema.metadata == {b"made": b"by hand"}
    assert found.drop_columns(["blank", "reward", "file_name"]).equals(given.drop_columns(["file_name"]))
    assert found["reward"].to_pylist() == [1.0] * 6
    assert all((tmp_path / "other" / name).is_file() for name in found["file_name"].to_pylist())
    score(tmp_path / "other" / "scored.parquet", "--reward", "chart_kind")
    assert pq.read_table(tmp_path / "other" / "scored.parquet").column_names == [
        *found.column_names[:-1],
        "chart_kind",
        "reward",
    ]
    score(folder, "--reward", "blank", "--output_file", str(folder / "scored.csv"))
    score(folder / "scored.csv", "--reward", "blank", "chart")
    with (folder / "scored.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [(row["file_name"], row["caption"]) for row in read] == [(row["file_name"], row["caption"]) for row in rows]
    assert np.allclose([float(row["reward"]) - float(row["chart"]) for row in read], 1)
    score(folder / "scored.csv", "--reward", "blank", "--output_file", str(folder / "flat.parquet"))
    assert pq.read_table(folder / "flat.parquet").schema.field("reward").type == pa.float64()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input_dir", "."], "must hold one of metadata.jsonl, metadata.csv, metadata.parquet, but has none"),
        (["--table", "none.jsonl"], "`table` 'none.jsonl' is not there"),
        (["--table", "text.txt"], "`table` 'text.txt' is no .jsonl, .csv, .parquet file"),
        ([], "give either `--input_dir`"),
        (["--table", "no_caption.jsonl"], "has none of caption, prompt, text"),
        (
            ["--table", "empty_caption.jsonl"],
            "Line 1 of empty_caption.jsonl (a.png): `caption` is ' '",
        ),
        (["--table", "no_image.jsonl"], "Line 2 of no_image.jsonl names b.png, which is not in ."),
        (["--table", "no_rows.jsonl"], "no_rows.jsonl holds no rows"),
        (["--table", "no_name.jsonl"], "has no `file_name`"),
        (["--table", "good.jsonl", "--output_file", "x.txt"], "`output_file` 'x.txt': give a file that ends with"),
        (["--table", "good.jsonl", "--batch_size", "0"], "`batch_size` 0: at least 1"),
        (["--table", "good.jsonl", "--reward", "chart_colour"], "`reward` chart_colour applies to none of 1 image"),
        (["--table", "good.jsonl", "--reward", "builtins.seed"], "'builtins.seed' cannot be imported"),
    ],
)
def test_mistakes(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    lines = {
        "no_caption": ['{"file_name": "a.png"}'],
        "empty_caption": ['{"file_name": "a.png", "caption": " "}'],
        "no_image": ['{"file_name": "a.png", "caption": "x"}', '{"file_name": "b.png", "caption": "x"}'],
        "no_rows": [],
        "no_name": ['{"caption": "x"}'],
        "good": ['{"file_name": "a.png", "caption": "x"}'],
    }
    Path("text.txt").write_text("x", encoding="utf-8")
    for name, rows in lines.items():
        Path(f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    before = Path("good.jsonl").read_bytes()
    reward = [] if "--reward" in flags else ["--reward", "blank"]
    assert main(["prefer", "score", *flags, *reward]) == 2
    assert message in capsys.readouterr().err and Path("good.jsonl").read_bytes() == before
