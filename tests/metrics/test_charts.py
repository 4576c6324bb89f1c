"""Programmes that read what a drawn chart shows: right on what was drawn, and on masks counted in other ways."""

import colorsys

import networkx
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2

from sciflow_hf.demo.mini_figures import COLOURS, COUNTS, KINDS, LATER_KINDS, SIZES, MiniFigure, mini_figures
from sciflow_hf.demo.mini_vae import pixels
from sciflow_hf.errors import SciflowError
from sciflow_hf.families.loading import MINI_KLEIN, model_source
from sciflow_hf.metrics import charts
from sciflow_hf.metrics.charts import (
    closeness_of_hue,
    colour_of,
    coloured,
    components,
    count_things,
    kind_of,
    runs,
)

EVERY = (*KINDS, *LATER_KINDS)


@pytest.mark.parametrize("style", ["plain", "dark", "night"])
def test_drawn_figures_are_counted(style: str) -> None:
    """All, but of dark pages a pie whose gaps are nearly as colourful as its slices."""
    wrong = [
        figure
        for figure in mini_figures(432, seed=11, style=style, held_out=None, kinds=EVERY)
        if count_things(figure.image(), figure.kind) != COUNTS[figure.count]
    ]
    assert len(wrong) <= 1 * (style == "dark"), wrong


@pytest.mark.parametrize("kind", EVERY)
def test_another_count_is_seen(kind: str) -> None:
    """The figures of one seed with two, three and four things."""
    counts = [count_things(MiniFigure(kind, "blue", count, 64, 96, seed=5).image(), kind) for count in COUNTS]
    assert counts == [2, 3, 4]


def test_kinds_are_told() -> None:
    assert set(charts.KINDS) == set(EVERY)
    for style in ("plain", "dark", "night"):
        figures = list(mini_figures(192, seed=31, style=style, held_out=None, kinds=EVERY))
        assert [figure for figure in figures if kind_of(figure.image()) != figure.kind] == []


def test_kinds_are_told_through_the_vae() -> None:
    """In all sizes, plain and night: 3,839 of 3,840 were right when it was measured."""
    vae = AutoencoderKLFlux2.from_pretrained(model_source(MINI_KLEIN), subfolder="vae")
    wrong = []
    for style in ("plain", "night"):
        for size in SIZES:
            figures = list(mini_figures(8, seed=41, style=style, sizes=[size], held_out=None))
            with torch.no_grad():
                seen = vae.decode(vae.encode(pixels(figures)).latent_dist.mode()).sample.clamp(-1, 1)
            arrays = ((seen + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
            wrong += [figure for figure, a in zip(figures, arrays, strict=True) if kind_of(a) != figure.kind]
    assert wrong == []


def test_no_kind() -> None:
    """Of a blank page, of a smudge, of one block, and of pages whose coloured thing touches the border."""
    page = np.full((64, 96, 3), 250)
    assert kind_of(page) is None
    page[20:26, 30:36] = (210, 40, 45)
    assert kind_of(page) is None
    page[10:50, 30:50] = (210, 40, 45)
    assert kind_of(page) is None
    for side in (np.s_[:7], np.s_[-7:], np.s_[:, :7], np.s_[:, -7:]):
        edge = np.full((64, 96, 3), 250)
        edge[side] = (210, 40, 45)
        assert kind_of(edge) is None


def test_closeness_of_hue() -> None:
    """Against the distance on the circle in degrees; it falls by half every 30 of them, whatever the saturation."""
    wanted = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(0.1, 0.8, 0.8))
    scores = []
    for degrees in range(0, 360, 20):
        page = np.full((20, 20, 3), 250)
        page[5:15, 5:15] = [round(255 * c) for c in colorsys.hsv_to_rgb((36 + degrees) / 360, 0.9, 0.7)]
        scores.append(closeness_of_hue(page, wanted))
        assert scores[-1] == pytest.approx(0.5 ** (min(degrees, 360 - degrees) / 30), abs=0.02)
    half = np.full((20, 20, 3), 250)
    half[5:10, 5:15], half[10:15, 5:15] = (200, 0, 0), (0, 200, 200)
    assert closeness_of_hue(half, (255, 0, 0)) == pytest.approx((1 + 2**-6) / 2)
    assert closeness_of_hue(np.full((20, 20, 3), 250), (255, 0, 0)) == 0


@pytest.mark.parametrize("style", ["plain", "night"])
def test_colours_are_named(style: str) -> None:
    figures = list(mini_figures(240, seed=12, style=style, held_out=None))
    wrong = [figure for figure in figures if colour_of(figure.image(), COLOURS) != figure.colour]
    assert wrong == []
    others = [colour_of(figure.image(), {"red": (255, 0, 0), "blue": (0, 0, 255)}) for figure in figures]
    assert all(
        name == "red" for name, f in zip(others, figures, strict=True) if f.colour in ("red", "orange", "yellow")
    )


def test_nothing_in_colour() -> None:
    assert colour_of(np.full((64, 96, 3), 250), COLOURS) is None
    for page in (np.full((64, 96, 3), 250), np.zeros((64, 96, 3)), np.full((64, 96, 3), (20, 25, 60))):
        assert [count_things(page, kind) for kind in KINDS] == [0] * len(KINDS)


def test_what_is_coloured() -> None:
    page = np.full((8, 10, 3), 240, dtype=np.uint8)
    page[2:5, 3:6] = (210, 40, 45)
    page[6] = 30  # ink
    assert np.array_equal(np.argwhere(coloured(page)), [[y, x] for y in (2, 3, 4) for x in (3, 4, 5)])


def test_runs_and_components_against_other_counts() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random((9, 13)) < 0.4
        text = "".join("x" if value else " " for value in mask[0])
        assert runs(mask[0]) == len(text.split())
        assert runs(mask[0], at_least=2) == sum(len(word) > 1 for word in text.split())
        graph = networkx.Graph()
        graph.add_nodes_from(map(tuple, np.argwhere(mask)))
        graph.add_edges_from(
            (a, b) for a in graph.nodes for b in graph.nodes if a < b and max(abs(a[0] - b[0]), abs(a[1] - b[1])) == 1
        )
        regions = [len(nodes) for nodes in networkx.connected_components(graph)]
        assert components(mask) == len(regions)
        assert components(mask, at_least=3) == sum(size >= 3 for size in regions)


def test_mistakes() -> None:
    with pytest.raises(SciflowError, match="`kind` 'radar chart': use one of bar chart, line plot"):
        count_things(np.zeros((8, 8, 3)), "radar chart")
    with pytest.raises(SciflowError, match=r"shape \(8, 8\), but is \(height, width, 3\)"):
        count_things(np.zeros((8, 8)), "bar chart")
