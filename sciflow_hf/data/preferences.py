"""Which candidates of a prompt are compared: one winner, and a loser for each axis that they are scored on."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ..errors import SciflowError, counted
from ..options import Options, arguments, option
from .writing import text_table

GROUP, REWARD, ROLE, AXIS = "group_id", "reward", "role", "axis"
"""Columns of a table of candidates: the prompt's group, and reward, or role (winner, loser) and what it is worse at."""
WINNER, LOSER = "winner", "loser"
WORST = "worst"
"""Name of the loser that is the worst of all, next to those of the axes."""


def _check_worst(args: "TupleArguments") -> None:
    if not args.axes:
        raise SciflowError("`global_worst` is a further loser next to those of `--axes`: name these, or leave it out.")


@arguments
class TupleArguments(Options):
    """Which candidates of a group become a winner and its losers (SciForma 2026, for several axes)."""

    heading: ClassVar[str] = "Choice of comparisons"

    axes: list[str] = option(
        [], "Score columns, each with a loser of its own. Without: one loser, the worst by reward."
    )
    min_candidates: int = option(2, "Groups with fewer scored candidates are left out.", within="[2, inf)")
    min_winner_reward: float = option(0.0, "A winner has at least this reward (SciForma: 0.7).", within="(-inf, inf)")
    min_reward_gap: float = option(0.2, "A loser has at least so much less reward.", within="[0, inf)")
    min_axis_gap: float = option(0.3, "A loser of an axis is at least so much worse there.", within="[0, inf)")
    max_other_gap: float = option(
        0.5, "and on every other axis no better, and at most so much worse.", within="[0, inf)"
    )
    every_axis: bool = option(True, "Leave out groups in which an axis has no loser.")
    global_worst: bool = option(
        False,
        "Also take the candidate of the least reward as a loser, if it is none of the axes'.",
        check=_check_worst,
    )


@dataclass(frozen=True)
class PreferenceTuple:
    """A winner and its losers.

    Attributes:
        group: its name.
        winner: row.
        losers: rows, distinct.
        axes: what each loser is worse at: an axis, or "worst".
        gaps: how much less of it each has; of "worst" less reward.
    """

    group: str
    winner: int
    losers: tuple[int, ...]
    axes: tuple[str, ...]
    gaps: tuple[float, ...]


@dataclass
class TupleReport:
    """How many groups have a tuple, and why others have none.

    Attributes:
        groups: all there are.
        kept: those with a tuple.
        dropped: reason -> groups.
        candidates: reason -> rows that no tuple could take.
        gaps: of each axis, over the tuples.
    """

    groups: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    candidates: Counter[str] = field(default_factory=Counter)
    gaps: dict[str, list[float]] = field(default_factory=dict)

    def keep(self, found: PreferenceTuple) -> None:
        """Counts a tuple."""
        self.kept += 1
        for axis, gap in zip(found.axes, found.gaps, strict=False):
            self.gaps.setdefault(axis, []).append(gap)

    def __str__(self) -> str:
        rows = [("groups", str(self.groups)), ("  with a winner and losers", str(self.kept))]
        rows += [(f"  {reason}", str(number)) for reason, number in self.dropped.most_common()]
        rows += [(f"candidates {reason}", str(number)) for reason, number in self.candidates.most_common()]
        rows += [(f"gap of {axis}", f"{np.mean(gaps):.3f} (least {min(gaps):.3f})") for axis, gaps in self.gaps.items()]
        return text_table(rows)


def choose_tuples(
    groups: Sequence[str | None],
    reward: np.ndarray,
    scores: Mapping[str, np.ndarray],
    rules: TupleArguments,
    *,
    kinds: Sequence[Hashable] | None = None,
    contents: Sequence[Hashable] | None = None,
) -> tuple[list[PreferenceTuple], TupleReport]:
    """One tuple for each group that has one, in order of the groups' first rows.

    The winner has the highest reward (of equals the highest sum of scores, then the first row). A candidate is a
    loser of an axis where it is worse by `min_axis_gap` there, by 0 to `max_other_gap` on every other axis, and has
    `min_reward_gap` less reward; it ranks by its gap less half the mean of the other gaps. Axes with the fewest
    candidates choose first. Without axes the loser is the worst by reward.

    Args:
        groups: of each of N rows; one without is left out.
        reward: (N,), NaN where there is none.
        scores: axis -> (N,), NaN where there is none; at least the axes of `rules`.
        rules: thresholds.
        kinds: of each row what must be the same within a group (size, sources): rows of other kinds than their
            group's commonest are left out.
        contents: of each row what tells equal images: a loser that is its winner is left out.

    Raises:
        SciflowError: an axis that is not in `scores`; no tuple survives, naming the threshold that cost most.
    """
    missing = [axis for axis in rules.axes if axis not in scores]
    if missing:
        raise SciflowError(
            f"`axes` {missing}: there is no such score column, but {', '.join(map(repr, scores)) or 'none'}. Score the "
            "candidates first (`sciflow-hf prefer score`), or name other axes."
        )
    report = TupleReport()
    return _of_groups(
        groups, report, lambda group, rows: _choose(group, rows, reward, scores, rules, kinds, contents, report)
    )


def given_tuples(
    groups: Sequence[str | None],
    roles: Sequence[str | None],
    axes: Sequence[str | None] | None = None,
    *,
    kinds: Sequence[Hashable] | None = None,
    contents: Sequence[Hashable] | None = None,
) -> tuple[list[PreferenceTuple], TupleReport]:
    """The tuples that a table gives by its roles: of each group one "winner" and its "loser" rows.

    Args:
        groups, kinds, contents: as of `choose_tuples`; losers of another kind than their winner are left out.
        roles: of each row; one without is left out.
        axes: what each loser is worse at.

    Raises:
        SciflowError: another role; no group has a winner and a loser.
    """
    odd = next((row for row, role in enumerate(roles) if role and role not in (WINNER, LOSER)), None)
    if odd is not None:
        raise SciflowError(f"`{ROLE}` of row {odd} is {roles[odd]!r}: use {WINNER!r}, {LOSER!r}, or leave it empty.")
    report = TupleReport()

    def given(group: str, rows: Sequence[int]) -> PreferenceTuple | str:
        winners, losers = ([row for row in rows if roles[row] == role] for role in (WINNER, LOSER))
        if len(winners) + len(losers) < len(rows):
            report.candidates["without a role"] += len(rows) - len(winners) - len(losers)
        if len(winners) != 1:
            return "no winner" if not winners else "more than one winner"
        winner = winners[0]
        alike = [row for row in losers if kinds is None or kinds[row] == kinds[winner]]
        if len(alike) < len(losers):
            report.candidates[_OTHER_KIND] += len(losers) - len(alike)
        others = _other_contents(alike, winner, contents, report)
        if not others:
            return "no loser"
        usual = [WORST] if len(others) == 1 else [f"loser {number + 1}" for number in range(len(others))]
        named = [None] * len(roles) if axes is None else axes
        names = [named[row] or name for row, name in zip(others, usual, strict=True)]
        return PreferenceTuple(group, winner, tuple(others), tuple(names), ())

    return _of_groups(groups, report, given)


_OTHER_KIND = "of another size, caption or sources than their group"


def _of_groups(
    groups: Sequence[str | None], report: TupleReport, choose: Callable[[str, list[int]], PreferenceTuple | str]
) -> tuple[list[PreferenceTuple], TupleReport]:
    """The tuples that `choose` makes of the rows of each group, counted."""
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        if group:
            members.setdefault(group, []).append(row)
        else:
            report.candidates["without a group"] += 1
    report.groups, found = len(members), []
    for group, rows in members.items():
        chosen = choose(group, rows)
        if isinstance(chosen, str):
            report.dropped[chosen] += 1
        else:
            report.keep(chosen)
            found.append(chosen)
    if not found:
        worst, number = report.dropped.most_common(1)[0] if report.dropped else ("there is none", 0)
        raise SciflowError(
            f"none of {counted(report.groups, 'group')} has a winner and its losers. Most often ({number}): {worst}. "
            "Lower that threshold, or draw more candidates for each prompt."
        )
    return found, report


def _other_contents(
    rows: Sequence[int], winner: int, contents: Sequence[Hashable] | None, report: TupleReport
) -> list[int]:
    """The rows whose content is not the winner's."""
    others = [row for row in rows if contents is None or contents[row] != contents[winner]]
    if len(others) < len(rows):
        report.candidates["with the same content as their winner"] += len(rows) - len(others)
    return others


def _choose(
    group: str,
    rows: Sequence[int],
    reward: np.ndarray,
    scores: Mapping[str, np.ndarray],
    rules: TupleArguments,
    kinds: Sequence[Hashable] | None,
    contents: Sequence[Hashable] | None,
    report: TupleReport,
) -> PreferenceTuple | str:
    """The tuple of a group, or why it has none."""
    known = [r for r in rows if math.isfinite(reward[r]) and all(math.isfinite(scores[a][r]) for a in rules.axes)]
    if len(known) < len(rows):
        report.candidates["without a reward or score"] += len(rows) - len(known)
    if kinds is not None and known:
        common = Counter(kinds[r] for r in known).most_common(1)[0][0]
        alike = [r for r in known if kinds[r] == common]
        if len(alike) < len(known):
            report.candidates[_OTHER_KIND] += len(known) - len(alike)
        known = alike
    if len(known) < rules.min_candidates:
        return f"fewer than {rules.min_candidates} candidates (`min_candidates`)"
    winner = max(known, key=lambda r: (reward[r], sum(scores[axis][r] for axis in rules.axes), -r))
    if reward[winner] < rules.min_winner_reward:
        return f"best reward below {rules.min_winner_reward:g} (`min_winner_reward`)"
    if all(reward[r] == reward[winner] for r in known) and not rules.axes:
        return "all rewards are equal"
    others = _other_contents([r for r in known if r != winner], winner, contents, report)
    lower = [r for r in others if reward[winner] - reward[r] >= rules.min_reward_gap]
    if not lower:
        return f"no reward is {rules.min_reward_gap:g} below the best (`min_reward_gap`)"
    if not rules.axes:
        loser = min(lower, key=lambda r: (reward[r], r))
        return PreferenceTuple(group, winner, (loser,), (WORST,), (float(reward[winner] - reward[loser]),))
    return _with_axes(group, winner, lower, reward, scores, rules)


def _with_axes(
    group: str,
    winner: int,
    lower: Sequence[int],
    reward: np.ndarray,
    scores: Mapping[str, np.ndarray],
    rules: TupleArguments,
) -> PreferenceTuple | str:
    """Losers of the axes, the axis with the fewest candidates first."""
    gap = {axis: {r: float(scores[axis][winner] - scores[axis][r]) for r in lower} for axis in rules.axes}

    def ranked(axis: str) -> list[int]:
        others = [gap[other] for other in rules.axes if other != axis]
        fitting = [
            r
            for r in lower
            if gap[axis][r] >= rules.min_axis_gap and all(0 <= other[r] <= rules.max_other_gap for other in others)
        ]
        mean = {r: float(np.mean([other[r] for other in others])) if others else 0.0 for r in fitting}
        return sorted(fitting, key=lambda r: (-(gap[axis][r] - 0.5 * mean[r]), r))

    candidates = {axis: ranked(axis) for axis in rules.axes}
    taken: dict[str, int] = {}
    for axis in sorted(rules.axes, key=lambda axis: len(candidates[axis])):
        free = [r for r in candidates[axis] if r not in taken.values()]
        if free:
            taken[axis] = free[0]
        elif rules.every_axis:
            return f"no loser of the axis {axis} (`min_axis_gap`, `max_other_gap`)"
    if not taken:
        return "no loser of any axis (`min_axis_gap`, `max_other_gap`)"
    axes = [axis for axis in rules.axes if axis in taken]
    losers, gaps = [taken[axis] for axis in axes], [gap[axis][taken[axis]] for axis in axes]
    if rules.global_worst:
        worst = min(lower, key=lambda r: (reward[r], r))
        if worst not in losers:
            axes, losers, gaps = [*axes, WORST], [*losers, worst], [*gaps, float(reward[winner] - reward[worst])]
    return PreferenceTuple(group, winner, tuple(losers), tuple(axes), tuple(gaps))
