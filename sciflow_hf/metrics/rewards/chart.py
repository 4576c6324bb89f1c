"""Rewards for small charts: whether kind, colour and count are those that were asked for, by `metrics/charts.py`.

They are read from the prompt ("A bar chart with three red bars"), and from the columns `kind`, `colour` and `count` if
a row has them: a house colour is a column of prompts that name none.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from ..charts import KINDS, closeness_of_hue, colour_of, count_things, kind_of

COLOURS = {
    "red": (210, 40, 45),
    "orange": (245, 140, 15),
    "yellow": (250, 205, 20),
    "green": (40, 160, 60),
    "cyan": (0, 180, 205),
    "blue": (30, 70, 200),
    "purple": (145, 55, 190),
    "pink": (245, 120, 185),
}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_KIND = re.compile(r"\b(bar|line|scatter|pie|flow|ring)[ -]?(?:chart|plot|graph|diagram)s?\b")
_COLOUR = re.compile(rf"\b({'|'.join(COLOURS)})\b")
_COUNT = re.compile(rf"\b({'|'.join(_NUMBERS)}|\d+) (?:\w+ )?(?:bar|line|point|slice|boxe?)s?\b(?! (?:chart|plot))")

Column = Sequence[Any] | None


def chart(
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    kind: Column = None,
    colour: Column = None,
    count: Column = None,
) -> list[float | None]:
    """The mean of `chart_kind`, `chart_colour` and `chart_count`, of those that apply.

    Args:
        prompts, images: of each chart.
        kind: of each what was asked for, a name; None: as the prompt says.
        colour: as `kind`.
        count: as `kind`, an integer or a word.
    """
    parts = [
        chart_kind(prompts, images, kind),
        chart_colour(prompts, images, colour),
        chart_count(prompts, images, kind, count),
    ]
    known = [[score for score in scores if score is not None] for scores in zip(*parts, strict=True)]
    return [sum(scores) / len(scores) if scores else None for scores in known]


def chart_kind(prompts: Sequence[str], images: Sequence[Image.Image], kind: Column = None) -> list[float | None]:
    """1 where the chart is of the kind that was asked for, else 0; None where none was."""
    asked = _asked(prompts, kind, _kind_in)
    return [None if k is None else float(kind_of(image) == k) for k, image in zip(asked, images, strict=True)]


def chart_colour(prompts: Sequence[str], images: Sequence[Image.Image], colour: Column = None) -> list[float | None]:
    """How near the chart's hue is to that of the colour that was asked for, see `closeness_of_hue`.

    None where none was, or where the prompt names several. There is no class with a boundary that training could
    creep up to: half way to orange, a red chart has lost a part of its score already.
    """
    asked = _asked(prompts, colour, _colour_in)
    return [None if c is None else closeness_of_hue(i, COLOURS[c]) for c, i in zip(asked, images, strict=True)]


def chart_look(
    prompts: Sequence[str], images: Sequence[Image.Image], kind: Column = None, colour: Column = None
) -> list[float | None]:
    """`chart_colour` of charts of the right kind, 0 for others: neither makes up for the other; None without both."""
    kinds, colours = chart_kind(prompts, images, kind), chart_colour(prompts, images, colour)
    return [None if k is None or c is None else k * c for k, c in zip(kinds, colours, strict=True)]


def chart_count(
    prompts: Sequence[str], images: Sequence[Image.Image], kind: Column = None, count: Column = None
) -> list[float | None]:
    """1 where as many things as were asked for are counted, as its kind is, else 0; None without kind or count."""
    kinds, counts = _asked(prompts, kind, _kind_in), _asked(prompts, count, _count_in)
    return [
        None if k is None or n is None else float(count_things(image, k) == n)
        for k, n, image in zip(kinds, counts, images, strict=True)
    ]


def chart_right(
    prompts: Sequence[str], images: Sequence[Image.Image], kind: Column = None, colour: Column = None
) -> list[float | None]:
    """1 where kind and colour are those that were asked for, else 0: for tables; None where neither was.

    The colour is right if none of `COLOURS` is nearer in hue. Training could creep up to that boundary, so the reward
    is `chart_colour`.
    """
    kinds, colours = _asked(prompts, kind, _kind_in), _asked(prompts, colour, _colour_in)
    return [
        None if k is None and c is None else float(k in (None, kind_of(i)) and c in (None, colour_of(i, COLOURS)))
        for k, c, i in zip(kinds, colours, images, strict=True)
    ]


def _asked(prompts: Sequence[str], column: Column, read: Callable[[str, str | None], Any]) -> list[Any]:
    column = column or [None] * len(prompts)
    values = [str(value).lower().strip() if value and value == value else None for value in column]
    return [read(prompt.lower(), value) for prompt, value in zip(prompts, values, strict=True)]


def _kind_in(prompt: str, value: str | None) -> str | None:
    found = set(_KIND.findall(prompt if value is None else value))
    if value is not None and len(found) != 1:
        raise ValueError(f"the column `kind` is {value!r}, but must be one of {', '.join(KINDS)}")
    return next(kind for kind in KINDS if kind.split()[0] in found) if len(found) == 1 else None


def _colour_in(prompt: str, value: str | None) -> str | None:
    if value is not None and value not in COLOURS:
        raise ValueError(f"the column `colour` is {value!r}, but must be one of {', '.join(COLOURS)}")
    found = set(_COLOUR.findall(prompt))
    return value or (found.pop() if len(found) == 1 else None)


def _count_in(prompt: str, value: str | None) -> int | None:
    found = set(_COUNT.findall(prompt)) if value is None else {value.removesuffix(".0")}
    if len(found) != 1:
        return None
    word = found.pop()
    if word not in _NUMBERS and not word.isdecimal():
        raise ValueError(f"the column `count` is {value!r}, but must be a number of things")
    return int(word) if word.isdecimal() else _NUMBERS.index(word)
