"""Pairs for edits: the target is the source but for the edit, and the folder is what `cache build` reads."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sciflow_hf.data.build.sources.find import find_records
from sciflow_hf.demo import demo_figures
from sciflow_hf.demo.mini_edits import EDITS, EditPair, edit_pairs
from sciflow_hf.demo.mini_figures import COLOURS, COUNTS, MiniFigure
from sciflow_hf.metrics.charts import colour_of, coloured, count_things


def images(pair: EditPair) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(pair.source.image()).astype(int), np.asarray(pair.target.image()).astype(int)


def test_every_edit_comes_as_often_as_it_should() -> None:
    pairs = list(edit_pairs(200, seed=2))
    assert Counter(pair.edit for pair in pairs) == {edit: 10 * share for edit, share in EDITS.items()}
    assert [p.instruction for p in edit_pairs(5, seed=3)] == [p.instruction for p in edit_pairs(5, seed=3)]
    assert {pair.edit for pair in edit_pairs(12, seed=2, edits=["grid", "axes"])} == {"grid", "axes"}


def test_recoloured_charts_differ_in_their_colour_alone() -> None:
    for pair in edit_pairs(40, seed=4, edits=["recolour"]):
        source, target = images(pair)
        assert pair.instruction == f"Make it {pair.target.colour}"
        assert colour_of(target, COLOURS) == pair.target.colour != colour_of(source, COLOURS)
        changed = np.abs(source - target).max(axis=2) > 8
        inside = coloured(source) | coloured(target)
        shifts = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]  # edges are smooth
        near = np.max([np.roll(np.pad(inside, 2), shift, (0, 1)) for shift in shifts], axis=0)[2:-2, 2:-2]
        assert not (changed & ~near).any(), "page and ink stay"


@pytest.mark.parametrize("edit", ["night", "grid", "axes"])
def test_layout_stays(edit: str) -> None:
    for pair in edit_pairs(30, seed=5, edits=[edit]):
        source, target = (coloured(image) for image in images(pair))
        assert (source & target).sum() > 0.75 * (source | target).sum(), pair
        count = count_things(pair.target.image(), pair.target.kind)
        assert count == COUNTS[pair.source.count] or pair.target.kind == "pie chart"


def test_what_is_added_and_taken_away() -> None:
    for pair in edit_pairs(20, seed=6, edits=["grid", "axes", "kind"]):
        source, target = images(pair)
        ink = [(image.max(axis=2) < 130).sum() for image in (source, target)]
        if pair.edit == "axes":
            assert ink[1] < ink[0] - 60
        elif pair.edit == "grid":
            assert (np.abs(source - target).max(axis=2) > 8).mean() > 0.05
        else:
            assert pair.source.kind != pair.target.kind and pair.instruction == f"Make it a {pair.target.kind}"
            assert (pair.source.count, pair.source.colour) == (pair.target.count, pair.target.colour)


def test_another_kind_shows_the_same_values() -> None:
    """Heights of bars and points, and sizes of slices, are in the order of the values; the layout never varies."""
    for pair in edit_pairs(40, seed=7, edits=["kind"]):
        values = np.array(pair.target.values)
        assert pair.source.values == pair.target.values and len(values) == COUNTS[pair.target.count]
        assert values.max() == 1 and (pair.source.kind != "flow chart" or values.min() == 1)
        assert pair.target.layout != pair.source.layout and pair.target.layout == 0
    shown = (1.0, 0.2, 0.6)
    for kind in ("bar chart", "scatter plot"):
        area = coloured(MiniFigure(kind, "red", "three", 64, 96, layout=3, values=shown).image())
        tops = [np.flatnonzero(part.any(axis=1)).min() for part in np.array_split(area[:, 12:88], 3, axis=1)]
        assert tops[0] < tops[2] < tops[1], kind
        assert (tops[1] - tops[0]) / (tops[1] - tops[2]) == pytest.approx(2, abs=0.3), kind
    page = coloured(MiniFigure("pie chart", "red", "three", 64, 64, layout=3, values=shown).image())
    y, x = np.nonzero(page)
    turns = (np.arctan2(y - y.mean(), x - x.mean()) / (2 * np.pi) + 0.25) % 1  # from the top, clockwise
    ends = np.cumsum([1.3, 0.82, 1.06]) / 3.18
    sizes = np.histogram(turns, [0, *ends])[0]
    assert sizes[0] > sizes[2] > sizes[1]
    emptier = np.histogram(turns, 60, (0, 1))[0]
    assert {round(60 * e) % 60 for e in ends} <= {i % 60 for j in np.argsort(emptier)[:9] for i in (j, j + 1)}


def test_folder_of_pairs(tmp_path: Path) -> None:
    folder = demo_figures(tmp_path, "demo_edits")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 460 and Counter(row.get("edit") for row in rows)["recolour"] == 160
    records, _ = find_records(folder)
    assert [record.source_names for record in records] == [(f"sources/{r.name}",) for r in records[:400]] + 60 * [()]
    assert demo_figures(tmp_path, "demo_edits") == folder
