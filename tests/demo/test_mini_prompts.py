"""Prompts of the demo of preferences, and captions without a colour."""

from collections import Counter

from sciflow_hf.demo import house_prompts, unnamed_figures
from sciflow_hf.demo.mini_figures import COLOURS, COUNTS, KINDS
from sciflow_hf.demo.mini_prompts import HOUSE_COLOUR, UNNAMED
from sciflow_hf.metrics.rewards.chart import chart_colour, chart_kind
from sciflow_hf.training.prompts import prompts_of


def names_of(words, text):
    return [word for word in words if word in text]


def test_half_of_the_prompts_name_no_colour():
    rows = house_prompts(240, seed=1)
    assert len(rows) == 240 and rows == house_prompts(240, seed=1)
    assert Counter(row["names_colour"] for row in rows) == {True: 120, False: 120}
    for row in rows:
        assert names_of(KINDS, row["prompt"]) == [row["kind"]]
        assert names_of(COLOURS, row["prompt"]) == ([row["colour"]] if row["names_colour"] else [])
        assert row["names_colour"] or row["colour"] == HOUSE_COLOUR
    unnamed = [row for row in rows if not row["names_colour"]]
    wordings = Counter(len(names_of(COUNTS, r["prompt"])) + 2 * r["prompt"].startswith("A figure") for r in unnamed)
    assert wordings[1] == 80 and wordings[0] + wordings[3] == 40 and min(wordings.values()) > 10
    assert Counter(row["kind"] for row in unnamed) == dict.fromkeys(KINDS, 24)
    assert {row["colour"] for row in rows if row["names_colour"]} == set(COLOURS)
    assert house_prompts(8, seed=2) != house_prompts(8, seed=1)
    assert all(len(house_prompts(number, seed=seed)) == number for number in (1, 2, 3) for seed in range(10))
    only = house_prompts(8, seed=1, wordings=UNNAMED[:1])
    assert all(names_of(COUNTS, row["prompt"]) for row in only)


def test_the_demo_is_a_name_of_prompts():
    rows = prompts_of("demo_preferences")
    assert len(rows) == 120 and rows == house_prompts(120, seed=1)


def test_rewards_ask_for_what_the_rows_say():
    """A drawn figure of what a row asks for has the highest score, one in another colour or of another kind less."""
    for row, figure in zip(house_prompts(6, seed=3), unnamed_figures(6, seed=3), strict=True):
        assert not names_of(COLOURS, figure.caption())
        columns = [row["prompt"]], [figure.image()]
        assert chart_kind(*columns, kind=[figure.kind]) == [1.0]
        [right] = chart_colour(*columns, colour=[figure.colour])
        [wrong] = chart_colour(*columns, colour=[{"red": "cyan", "blue": "yellow"}.get(figure.colour, "blue")])
        assert right > 0.85 and wrong < 0.5


def test_captions_without_a_colour_show_any():
    figures = unnamed_figures(400, seed=0)
    captions = [figure.caption() for figure in figures]
    assert not any(names_of(COLOURS, caption) for caption in captions)
    assert {figure.colour for figure in figures} == set(COLOURS)
    with_count = sum(bool(names_of(COUNTS, caption)) for caption in captions)
    assert 230 < with_count < 300
