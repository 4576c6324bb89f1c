"""The scores of a judge's errors, against a line of Python written from the description of the published scorer."""

import random

import pytest

from sciflow_hf.metrics.judge.scoring import AXES, Answer, Error, axis_score, score, weight

CRITICAL, MODERATE, MINOR = (Error(f"Missing: {s}", s) for s in ("critical", "moderate", "minor"))


def independent(errors: list[tuple[str, str]], n: int) -> float:
    """Published: severities weigh 1, .5, 0, unknown .5; "wrong" in 15 characters is minor, after the three tests."""
    light = [
        "wrong" in d.lower()[:15]
        and not any(
            w in d.lower()[:k] for w, k in {"hallucinated": 30, "garbled": 30, "unreadable": 30, "missing": 15}.items()
        )
        for d, _ in errors
    ]
    return max(
        0,
        1
        - sum(
            {"critical": 1, "moderate": 0.5, "minor": 0}.get(s, 0.5) * (not w)
            for (_, s), w in zip(errors, light, strict=True)
        )
        / min(max(n, 1), 30),
    )


DESCRIPTIONS = [
    ("Missing: decoder", True),
    ("Wrong: a cat where a dog should be", False),
    ("wrong label", False),
    ("It is wrong here", False),  # ends at the 10th
    ("A label, wrong", False),
    ("The label is wrong", True),  # begins at the 14th, so that no more than "wr" lies within 15
    ("Text is wrong...", False),
    ("Missing, wrong", True),
    ("Wrong or missing", False),  # "missing" ends at the 16th character
    ("Garbled: wrong letters", True),
    ("Wrong and unreadable", True),
    ("Hallucinated: wrong arrow", True),
    ("Wrong: looks hallucinated", True),
    ("Structural mismatch", True),
    ("", True),
]


@pytest.mark.parametrize(("description", "counts"), DESCRIPTIONS)
def test_what_begins_with_wrong_costs_nothing(description: str, counts: bool) -> None:
    for severity, cost in (
        ("critical", 1),
        ("moderate", 0.5),
        ("minor", 0),
        ("severe", 0.5),
        ("Critical", 0.5),
        ("", 0.5),
    ):
        error = Error(description, severity)
        assert weight(error) == cost * counts
        assert axis_score([error], 4) == independent([error], 4) == 1 - cost * counts / 4


@pytest.mark.parametrize(
    ("errors", "elements", "expected"),
    [
        ([], 3, 1),
        ([CRITICAL], 0, 0),  # one element at least
        ([CRITICAL, MODERATE, MINOR], 6, 0.75),
        ([CRITICAL] * 4, 3, 0),  # never below 0
        ([CRITICAL] * 15, 30, 0.5),
        ([CRITICAL] * 15, 31, 0.5),  # no more than 30 count
        ([CRITICAL] * 15, 400, 0.5),
    ],
)
def test_an_axis(errors: list[Error], elements: int, expected: float) -> None:
    assert axis_score(errors, elements) == independent(errors, elements) == expected


def test_random_answers_score_as_published() -> None:
    draw = random.Random(0)
    for _ in range(500):
        errors = {
            axis: [
                Error(draw.choice(DESCRIPTIONS)[0], draw.choice(["critical", "moderate", "minor", "odd"]))
                for _ in range(draw.randrange(5))
            ]
            for axis in AXES
        }
        elements = {axis: draw.choice([0, 1, 2, 7, 29, 30, 31, 90]) for axis in AXES}
        found = [independent(errors[axis], n) for axis, n in elements.items() if n]
        everything = [error for some in errors.values() for error in some]
        expected = max(0.01, sum(found) / len(found)) if found else 0.5 if everything else 1
        for published in (True, False):
            result = score({a: Answer(e) for a, e in errors.items()}, elements, published=published)
            assert result.overall == pytest.approx(expected, abs=1e-12) and not result.incomplete
            assert [v for v in result.axes.values() if v is not None] == found


def test_the_text_axis_counts() -> None:
    answers = {"component": Answer(), "arrow": Answer(), "text": Answer([CRITICAL])}
    result = score(answers, {"component": 2, "arrow": 2, "text": 2})
    assert result.axes == {"component": 1, "arrow": 1, "text": 0.5} and result.overall == pytest.approx(2.5 / 3)


def test_axes_without_elements_are_left_out() -> None:
    answers = {axis: Answer([CRITICAL]) for axis in AXES}
    result = score(answers, {"component": 2, "arrow": 0, "text": 0})
    assert result.axes == {"component": 0.5, "arrow": None, "text": None} and result.overall == 0.5
    assert score(answers, {"component": 1, "arrow": 1, "text": 1}).overall == 0.01  # the least


@pytest.mark.parametrize("published", [True, False])
def test_no_elements_at_all(published: bool) -> None:
    none = dict.fromkeys(AXES, 0)
    assert score({axis: Answer() for axis in AXES}, none, published=published).overall == 1
    assert score({"text": Answer([MINOR])}, none, published=published).overall == 0.5


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("elements", [0, 3])
def test_broken(published: bool, elements: int) -> None:
    numbers = dict.fromkeys(AXES, elements)
    result = score({"component": Answer(broken=True), "arrow": Answer()}, numbers, published=published)
    assert result.overall == 0 and set(result.axes.values()) == {None}
    listed = score({"component": Answer(broken=True), "arrow": Answer([MINOR])}, numbers, published=published)
    assert listed.overall == (1 if elements else 0.5)  # with an error it is scored like any other


def test_a_failed_axis_is_left_out_or_free_of_errors_as_published() -> None:
    answers, numbers = (
        {"component": Answer([CRITICAL]), "arrow": None, "text": Answer([MODERATE])},
        dict.fromkeys(AXES, 2),
    )
    ours = score(answers, numbers)
    assert ours.axes == {"component": 0.5, "arrow": None, "text": 0.75} and ours.overall == 0.625
    assert ours.incomplete and ours.failed == ("arrow",)
    theirs = score(answers, numbers, published=True)
    assert theirs.axes["arrow"] == 1 and theirs.overall == 0.75 and theirs.incomplete
    nothing = dict.fromkeys(AXES)
    assert score(nothing, numbers).overall is None and score(nothing, numbers, published=True).overall == 1
    assert score(nothing, numbers).failed == AXES and score({}, numbers).overall is None
