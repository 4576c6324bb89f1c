"""Scores of the errors that a judge lists: the arithmetic of SciFormaBench (arXiv 2607.18091, its published code)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

AXES = ("component", "arrow", "text")
WEIGHTS = {"critical": 1.0, "moderate": 0.5, "minor": 0.0}
UNKNOWN = 0.5  # the weight of any other severity
MOST = 30  # elements that an axis is divided by

# The first of these words within so many characters of a description is the kind of the error.
_KINDS = (("hallucinated", 30), ("garbled", 30), ("unreadable", 30), ("missing", 15), ("wrong", 15))


class Error(NamedTuple):
    """One error of a drawn figure: what is wrong, and critical, moderate or minor."""

    description: str
    severity: str


@dataclass(frozen=True)
class Answer:
    """A judge's answer on one axis.

    Attributes:
        errors: the errors that it lists.
        broken: whether it calls the picture blank or noise.
    """

    errors: Sequence[Error] = ()
    broken: bool = False


@dataclass(frozen=True)
class Score:
    """The score of a figure, 0 to 1.

    Attributes:
        overall: mean of the axes, at least 0.01; None where no axis was answered.
        axes: axis -> score; None where it has no elements or no answer, and where the picture is broken.
        failed: axes that were asked and not answered.
    """

    overall: float | None
    axes: dict[str, float | None]
    failed: tuple[str, ...] = ()

    @property
    def incomplete(self) -> bool:
        return bool(self.failed)


def weight(error: Error) -> float:
    """The cost of an error: critical 1, moderate 0.5, minor 0, any other severity 0.5. "Wrong ..." costs nothing."""
    start = error.description.lower()
    kind = next((word for word, within in _KINDS if word in start[:within]), "")
    return 0.0 if kind == "wrong" else WEIGHTS.get(error.severity, UNKNOWN)


def axis_score(errors: Sequence[Error], elements: int) -> float:
    """1 less the weight of the errors over the number of elements, of which 1 to 30 count; at least 0."""
    return max(0.0, 1 - sum(map(weight, errors)) / min(max(elements, 1), MOST))


def score(answers: Mapping[str, Answer | None], elements: Mapping[str, int], *, published: bool = False) -> Score:
    """The score of a figure from the answers on its axes.

    An axis without elements has no score. Without elements on any axis the figure has 1 if no error is listed, else
    0.5. A figure that is called broken, without an error on any axis, has 0 and no axes.

    Args:
        answers: axis -> answer, None where the call failed or its answer could not be read; of the axes asked.
        elements: axis -> number of its elements in the rubric.
        published: count a failed axis as one without errors, as the published scorer does when it asks axis by axis;
            else it is left out.
    """
    failed = tuple(axis for axis in AXES if axis in answers and answers[axis] is None)
    given = {axis: answer for axis in AXES if (answer := answers.get(axis)) is not None}
    if published:
        given |= dict.fromkeys(failed, Answer())
    axes: dict[str, float | None] = dict.fromkeys(AXES)
    if not given:
        return Score(None, axes, failed)
    errors = sum(len(answer.errors) for answer in given.values())
    if not errors and any(answer.broken for answer in given.values()):
        return Score(0.0, axes, failed)
    if not any(elements.values()):
        return Score(0.5 if errors else 1.0, axes, failed)
    axes |= {axis: axis_score(given[axis].errors, elements[axis]) for axis in given if elements[axis]}
    scored = [value for value in axes.values() if value is not None]
    return Score(max(0.01, sum(scored) / len(scored)) if scored else None, axes, failed)
