"""Which candidates become winners and losers: every rule by a small table, and against a search over all tuples."""

import itertools
from typing import Any

import numpy as np
import pytest

from sciflow_hf.data.preferences import PreferenceTuple, TupleArguments, choose_tuples
from sciflow_hf.errors import SciflowError

PUBLISHED: dict[str, Any] = {
    "axes": ["component", "text"], "min_candidates": 6, "min_winner_reward": 0.7, "min_reward_gap": 0.2,
    "min_axis_gap": 0.3, "max_other_gap": 0.5,
}  # fmt: skip


def choose(rewards: list[float], scores: dict[str, list[float]] | None = None, **rules: Any) -> Any:
    kinds, contents = rules.pop("kinds", None), rules.pop("contents", None)
    found, report = choose_tuples(
        ["a"] * len(rewards), np.array(rewards), {n: np.array(v) for n, v in (scores or {}).items()},
        TupleArguments(**rules), kinds=kinds, contents=contents,
    )  # fmt: skip
    return found[0], report


def test_the_best_and_the_worst_by_reward() -> None:
    found, report = choose([0.5, 0.9, 0.1, 0.3])
    assert found == PreferenceTuple("a", 1, (2,), ("worst",), (pytest.approx(0.8),))
    assert (report.groups, report.kept, dict(report.dropped)) == (1, 1, {})
    assert "gap of worst" in str(report) and "0.800" in str(report)


def test_a_loser_an_axis() -> None:
    scores = {"component": [1.0, 0.5, 1.0, 0.4, 0.9, 0.7], "text": [1.0, 1.0, 0.6, 0.4, 0.2, 0.9]}
    found, _ = choose([1.0, 0.7, 0.7, 0.3, 0.5, 0.75], scores, **PUBLISHED)
    # Row 3 loses both by more than .5 elsewhere; row 4 is the largest gap in text with little lost in components.
    assert (found.winner, found.losers, found.axes) == (0, (1, 4), ("component", "text"))
    found, _ = choose([1.0, 0.7, 0.7, 0.3, 0.5, 0.75], scores, **PUBLISHED | {"global_worst": True})
    assert (found.losers, found.axes) == ((1, 4, 3), ("component", "text", "worst"))


def test_an_axis_with_few_candidates_chooses_first() -> None:
    scores = {"component": [1.0, 0.5, 0.6, 1.0], "text": [1.0, 0.6, 1.0, 1.0]}
    found, _ = choose([1.0, 0.6, 0.7, 0.9], scores, axes=["component", "text"])
    assert found.losers == (2, 1), "row 1 is the only loser of text"


def by_search(reward: np.ndarray, scores: dict[str, np.ndarray], rules: TupleArguments) -> set[tuple[int, ...]]:
    """All tuples that the rules allow, by trying every one."""
    n = len(reward)
    winner = max(range(n), key=lambda r: (reward[r], sum(s[r] for s in scores.values()), -r))
    found = set()
    for losers in itertools.permutations([r for r in range(n) if r != winner], len(rules.axes)):
        fine = reward[winner] >= rules.min_winner_reward
        for axis, loser in zip(rules.axes, losers, strict=True):
            gaps = {name: s[winner] - s[loser] for name, s in scores.items()}
            own = gaps.pop(axis)
            fine &= own >= rules.min_axis_gap and all(0 <= gap <= rules.max_other_gap for gap in gaps.values())
            fine &= reward[winner] - reward[loser] >= rules.min_reward_gap
        if fine:
            found.add((winner, *losers))
    return found


def test_what_is_chosen_is_allowed_and_nothing_allowed_is_missed() -> None:
    rng, seen = np.random.default_rng(0), 0
    for _ in range(300):
        scores = {"component": rng.integers(0, 11, 8) / 10, "text": rng.integers(0, 11, 8) / 10}
        reward = (scores["component"] + scores["text"]) / 2
        rules = TupleArguments(**PUBLISHED)
        allowed = by_search(reward, scores, rules)
        try:
            found = choose_tuples(["g"] * 8, reward, scores, rules)[0][0]
        except SciflowError:
            assert not allowed
            continue
        seen += 1
        assert (found.winner, *found.losers) in allowed
    assert seen > 50


@pytest.mark.parametrize(
    ("rewards", "rules", "reason"),
    [
        ([0.9], {}, "fewer than 2 candidates"),
        ([0.5, 0.5, 0.5], {}, "all rewards are equal"),
        ([0.6, 0.1], {"min_winner_reward": 0.7}, "best reward below 0.7"),
        ([0.6, 0.5], {}, "no reward is 0.2 below the best"),
        ([0.6, float("nan")], {}, "fewer than 2 candidates"),
        ([0.9, 0.1], {"kinds": ["wide", "tall"]}, "fewer than 2 candidates"),
        ([0.9, 0.1], {"contents": ["same", "same"]}, "no reward is 0.2 below the best"),
    ],
)
def test_why_a_group_has_none(rewards: list[float], rules: dict[str, Any], reason: str) -> None:
    with pytest.raises(SciflowError, match="none of 1 group has a winner and its losers") as error:
        choose(rewards, **rules)
    assert reason in str(error.value)


def test_a_score_column_that_is_not_there() -> None:
    with pytest.raises(SciflowError, match=r"`axes` \['arrow'\]: there is no such score column, but 'text'"):
        choose([0.9, 0.1], {"text": [1.0, 0.0]}, axes=["arrow"])


def test_what_is_left_out_is_counted() -> None:
    groups = ["a", "a", "b", "b", "b", "c", "c", "c"]
    reward = np.array([0.9, 0.1, 0.5, 0.5, 0.5, 0.8, float("nan"), 0.2])
    found, report = choose_tuples(groups, reward, {}, TupleArguments(), kinds=["w"] * 8)
    assert [(t.group, t.winner, t.losers) for t in found] == [("a", 0, (1,)), ("c", 5, (7,))]
    assert report.dropped == {"all rewards are equal": 1} and report.candidates == {"without a reward or score": 1}
