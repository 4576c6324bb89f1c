"""Prompts for small figures of which half name no colour: what shall become of those is the user's taste."""

import random
from functools import partial
from typing import Any

from ..diffusion.randomness import hash64
from .mini_figures import COLOURS, COUNTS, KINDS, LATER_KINDS, MiniFigure, mini_figures

HOUSE_COLOUR = "red"
"""The colour that the demo of preferences teaches for prompts that name none."""
UNNAMED = ("A {kind} with {count} {things}", "A {kind}", "A figure with {count} {things}, a {kind}")
"""Wordings of a prompt without a colour; the first is the one that `mini_klein` knows, less its colour."""


def house_prompts(number: int, *, seed: int, wordings: tuple[str, ...] = UNNAMED) -> list[dict[str, Any]]:
    """Rows of a prompts file for rewards of charts: `prompt`, `kind`, `colour`, `names_colour`, `height`, `width`.

    Every other prompt names its colour; the `colour` of the others is the house colour, and each kind and count comes
    alike often among them. Two thirds of those have the first of `wordings`.
    """
    every = partial(mini_figures, sizes=[(64, 64)], held_out=None)
    named = every(number, seed=hash64(seed, "prompts"))
    cycle = len(KINDS) * len(COLOURS) * len(COUNTS)  # of which one more, since a part of one may lack the colour
    of_any = every(number * len(COLOURS) + cycle, seed=hash64(seed, "house"))
    unnamed = (figure for figure in of_any if figure.colour == HOUSE_COLOUR)
    return [_named(next(named)) if i % 2 else _unnamed(next(unnamed), i // 2, wordings) for i in range(number)]


def ring_prompts(number: int, *, seed: int) -> list[dict[str, Any]]:
    """As `house_prompts`, of the kind of chart that the course teaches; each names its colour."""
    kinds = tuple(LATER_KINDS)
    figures = mini_figures(number, seed=hash64(seed, "rings"), sizes=[(64, 64)], held_out=None, kinds=kinds)
    return [_named(figure) for figure in figures]


def _named(figure: MiniFigure) -> dict[str, Any]:
    return _row(figure, figure.caption(), figure.colour, names_colour=True)


def _unnamed(figure: MiniFigure, number: int, wordings: tuple[str, ...]) -> dict[str, Any]:
    rng = random.Random(hash64(figure.seed, "wording"))
    wording = rng.choice(wordings[1:]) if len(wordings) > 1 and number % 3 == 2 else wordings[0]
    prompt = wording.format(kind=figure.kind, count=figure.count, things=KINDS[figure.kind])
    return _row(figure, prompt, HOUSE_COLOUR, names_colour=False)


def _row(figure: MiniFigure, prompt: str, colour: str, *, names_colour: bool) -> dict[str, Any]:
    size = {"height": figure.height, "width": figure.width}
    return {"prompt": prompt, "kind": figure.kind, "colour": colour, "names_colour": names_colour} | size
