"""Rewards: what a prompt asks for, several of them with weights, and rewards that fail."""

import logging
import math
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sciflow_hf.demo.mini_figures import COLOURS, MiniFigure, mini_figures
from sciflow_hf.errors import SciflowError
from sciflow_hf.metrics.rewards import base, chart
from sciflow_hf.metrics.rewards.base import Scores, load_reward, load_rewards, score_images
from sciflow_hf.metrics.rewards.guards import aspect, blank


def page(colour: tuple[int, int, int] = (250, 250, 250), size: tuple[int, int] = (96, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


IMAGES = [page((i, i, i)) for i in range(4)]
PROMPTS = ["a", "b", "c", "d"]


# ---- charts ----


def test_captions_of_drawn_figures_are_understood() -> None:
    figures = list(mini_figures(96, seed=3, held_out=None))
    prompts, images = [f.caption() for f in figures], [f.image() for f in figures]
    assert chart.COLOURS == COLOURS
    assert chart.chart_kind(prompts, images) == chart.chart_right(prompts, images) == [1.0] * 96
    assert chart.chart_count(prompts, images) == [1.0] * 96
    assert all(score is not None and score > 0.87 for score in chart.chart_colour(prompts, images))


@pytest.mark.parametrize(
    ("prompt", "kind", "colour", "count"),
    [
        ("A bar chart with three red bars", "bar chart", "red", 3),
        ("An ORANGE Line-Graph of 2 lines", "line plot", "orange", 2),
        ("A flowchart with twelve boxes", "flow chart", None, 12),
        ("A scatter plot, one point", "scatter plot", None, 1),
        ("Two pie charts side by side", "pie chart", None, None),
        ("A red and a blue line plot", "line plot", None, None),
        ("A bar chart next to a pie chart with two bars and three slices", None, None, None),
        ("A figure of redness in 2024", None, None, None),
    ],
)
def test_what_a_prompt_asks_for(prompt: str, kind: str | None, colour: str | None, count: int | None) -> None:
    """Several kinds, colours or counts in one prompt are none."""
    shown = kind or "bar chart"
    image = [MiniFigure(shown, colour or "green", "two", 64, 96).image()]
    assert chart.chart_kind([prompt], image) == [None if kind is None else 1.0]
    assert [s is None for s in chart.chart_colour([prompt], image)] == [colour is None]
    wanted = None if kind is None or count is None else float(count == 2)
    assert chart.chart_count([prompt], image) == [wanted]


def test_columns_override_the_prompt() -> None:
    image = [MiniFigure("bar chart", "red", "two", 64, 96).image()]
    prompt = ["A pie chart with three blue slices"]
    assert chart.chart(prompt, image, kind=["bar chart"], colour=["red"], count=[2]) == [pytest.approx(1, abs=0.04)]
    assert chart.chart(prompt, image, kind=[None], colour=[math.nan], count=[""]) == chart.chart(prompt, image)
    assert chart.chart_count(prompt, image, kind=["bar chart"], count=["two"]) == [1.0]
    assert chart.chart_count(prompt, image, kind=["bar chart"], count=[2.0]) == [1.0]
    parts = (
        chart.chart_kind(prompt, image)[0],
        chart.chart_colour(prompt, image)[0],
        chart.chart_count(prompt, image)[0],
    )
    assert chart.chart(prompt, image) == [pytest.approx(np.mean(parts))]
    assert chart.chart(["A map"], image) == chart.chart_right(["A map"], image) == [None]
    prompts = ["Make it red", "Make it blue", "A red pie chart", "A bar chart"]
    assert chart.chart_right(prompts, 4 * image) == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"kind": "radar"}, "`kind` is 'radar', but must be one of bar chart"),
        ({"colour": "teal"}, "`colour` is 'teal', but must be one of red"),
        ({"count": "many"}, "`count` is 'many', but must be a number"),
    ],
)
def test_columns_that_name_nothing(columns: dict[str, str], message: str) -> None:
    image = [MiniFigure("bar chart", "red", "two", 64, 96).image()] * 2
    given = {name: [None, value] for name, value in columns.items()}
    scores = score_images(load_rewards(["chart"]), ["A bar chart"] * 2, image, given)
    assert scores.columns["chart"] == [1.0, None]
    assert [(failure.row, message in failure.reason) for failure in scores.failures] == [(1, True)]


def test_colour_grows_steadily_towards_the_wanted_one() -> None:
    """No boundary between classes that training could creep up to."""
    scores = []
    for share in np.linspace(0, 1, 21):
        image = page()
        mixed = (1 - share) * np.array(COLOURS["blue"]) + share * np.array(COLOURS["purple"])
        image.paste(tuple(round(c) for c in mixed), (20, 20, 60, 50))
        scores.append(chart.chart_colour(["x"], [image], ["purple"])[0])
    steps = np.diff(np.array(scores, dtype=float))
    assert (steps > 0).all() and steps.max() < 8 * steps.min() and scores[-1] == pytest.approx(1, abs=0.01)


# ---- guards ----


def test_aspect() -> None:
    images = [page(size=(96, 64)), page(size=(64, 96)), page(size=(96, 64)), page(size=(90, 60))]
    scores = aspect(PROMPTS, images, width=[96, 96, None, "1200"], height=[64, 64, 64, 800])
    assert scores == [1.0, pytest.approx((64 / 96) / (96 / 64)), None, 1.0]
    assert aspect(PROMPTS, images) == [None] * 4
    assert aspect(["a"], [page(size=(96, 64))], width=[64], height=[64]) == [pytest.approx(2 / 3)]


def test_blank() -> None:
    noisy = Image.fromarray(np.random.default_rng(0).integers(120, 136, (64, 96, 3), dtype=np.uint8))
    figures = [f.image() for style in ("plain", "night") for f in mini_figures(40, seed=1, style=style)]
    assert blank(PROMPTS, [page(), page((0, 0, 0)), page((30, 60, 200)), noisy]) == [0, 0, 0, 0]
    assert blank([""] * len(figures), figures) == [1] * len(figures)


# ---- several rewards ----


def brightness(prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any) -> list[float | None]:
    return [float(np.asarray(image).mean()) for image in images]


def extra(prompts: Sequence[str], images: Sequence[Image.Image], extra: Sequence[float | None]) -> list[float | None]:
    return list(extra)


def test_weighted_sum() -> None:
    """A reward that does not apply adds nothing; where none applies there is no sum."""
    rewards = load_rewards([brightness, extra], [2.0, -0.5])
    scores = score_images(rewards[1:], PROMPTS, IMAGES, {"extra": [10.0, None, 3.0, None], "other": [0] * 4})
    assert scores.columns == {"extra": [10.0, None, 3.0, None]}
    assert scores.table(rewards[1:])["reward"] == [-5.0, None, -1.5, None]
    both = score_images(rewards, PROMPTS, IMAGES, {"extra": [10.0, None, 3.0, None]}).table(rewards)
    assert both["reward"] == [2 * 0 - 5.0, 2 * 1, 2 * 2 - 1.5, 2 * 3]
    assert list(both) == ["brightness", "extra", "reward"]


def faulty(bad: Any) -> Any:
    """A reward that spoils the third image."""

    def spoilt(prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any) -> list[Any]:
        if bad is None:
            return [1.0] * (len(images) - ("c" in prompts))
        if isinstance(bad, Exception) and "c" in prompts:
            raise bad
        return [bad if prompt == "c" else torch.tensor(1.0) for prompt in prompts]

    return spoilt


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (math.nan, "it returned nan"),
        (-math.inf, "it returned -inf"),
        ("good", "it returned 'good', not a number"),
        (None, "it returned 0 scores for 1 image"),
        (RuntimeError("out of luck\nsecond line"), "RuntimeError: out of luck"),
    ],
)
def test_a_reward_that_fails_costs_its_image(bad: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    rewards = load_rewards([brightness, faulty(bad)])
    scores = score_images(rewards, PROMPTS, IMAGES)
    assert scores.columns == {"brightness": [0, 1, 2, 3], "spoilt": [1, 1, None, 1]}
    assert [(f.row, f.reason) for f in scores.failures] == [(2, reason)]
    assert scores.table(rewards)["reward"][2] is None
    with caplog.at_level(logging.WARNING):
        scores.check(["a.png", "b.png", "c.png", "d.png"])
    assert f"failed on c.png ({reason}); these have no `reward`" in caplog.text


def test_a_reward_that_always_fails_ends_the_run() -> None:
    def broken(prompts: Any, images: Any) -> Any:
        return None

    scores = score_images(load_rewards([brightness, broken]), PROMPTS, IMAGES)
    with pytest.raises(
        SciflowError, match=r"`reward` broken failed on all of 4 images it applies to, first on a.png \(TypeError"
    ):
        scores.check(["a.png", "b.png", "c.png", "d.png"])
    with pytest.raises(SciflowError, match="`reward` chart_colour applies to none of 4 images: it needs one colour"):
        score_images(load_rewards(["chart_colour"]), PROMPTS, IMAGES).check(PROMPTS)
    empty = score_images(load_rewards(["blank"]), [], [])
    assert empty == Scores({"blank": []}) and empty.table(load_rewards(["blank"])) == {"blank": [], "reward": []}


def test_a_mistake_of_the_setting_ends_the_run_at_once() -> None:
    def unset(prompts: Any, images: Any) -> Any:
        raise SciflowError("no server")

    with pytest.raises(SciflowError, match="no server"):
        score_images(load_rewards([unset]), PROMPTS, IMAGES)


def test_rewards_by_path(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_rewards")
    module.brightness, module.number = brightness, 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    assert load_reward("my_rewards.brightness") is brightness
    assert [(r.name, r.weight) for r in load_rewards(["chart", "my_rewards.brightness"], [1, 3])] == [
        ("chart", 1.0),
        ("brightness", 3.0),
    ]
    for name in base.BUILT_IN:
        assert callable(load_reward(name))


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["chrat"], [], "`reward` 'chrat' is unknown: use ocr, chart"),
        (["no_such_module.x"], [], "'no_such_module.x' cannot be imported: No module named 'no_such_module'"),
        (["sciflow_hf.no_such"], [], "'sciflow_hf.no_such' cannot be imported"),
        (["math.pi"], [], "'math.pi' is 3.14"),
        (["chart", "chart"], [], "chart, chart: each needs a name of its own"),
        (["chart"], [1, 2], "`reward_weights` has 2 values for 1 reward: give one each"),
        (["chart"], [math.nan], "finite numbers are needed"),
    ],
)
def test_rewards_that_are_none(names: list[str], weights: list[float], message: str) -> None:
    with pytest.raises(SciflowError, match=message.replace("(", r"\(")):
        load_rewards(names, weights)
