"""Pairs of small drawn figures, one the other's edit: another colour or kind, a grid, no axes, the night style."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..diffusion.randomness import hash64
from .folders import CaptionedImage, write_figures
from .mini_figures import COLOURS, COUNTS, KINDS, MiniFigure, captioned, mini_figures, ring_figures

EDITS = {"recolour": 8, "night": 5, "kind": 3, "grid": 2, "axes": 2}
"""Kinds of edits, and how many of 20 pairs are of each."""
_USUAL = 0
"""The layout of figures of another kind."""
_WITH_AXES = ("bar chart", "line plot", "scatter plot")


@dataclass(frozen=True)
class EditPair:
    """A figure, what to do with it, and the figure that this makes.

    Attributes:
        edit: a key of `EDITS`.
        instruction: the edit in words.
        source: the figure to change.
        target: the same layout and look, but for the edit; of another kind the same page, colour and values in a layout
            that is always the same, so that the source decides all of it.
    """

    edit: str
    instruction: str
    source: MiniFigure
    target: MiniFigure


def edit_pairs(
    number: int,
    *,
    seed: int,
    sizes: Sequence[tuple[int, int]] = ((64, 96),),
    edits: Sequence[str] = (),
) -> Iterator[EditPair]:
    """Pairs of every kind of edit in turn, as often as `EDITS` says, or alike often of the named `edits`."""
    turns = list(edits) or [edit for edit, share in EDITS.items() for _ in range(share)]
    random.Random(hash64(seed, "edits")).shuffle(turns)
    for i, figure in enumerate(mini_figures(number, seed=hash64(seed, "sources"), sizes=sizes, held_out=None)):
        yield _pair(turns[i % len(turns)], figure, random.Random(hash64(seed, "edit", i)))


def _pair(edit: str, figure: MiniFigure, rng: random.Random) -> EditPair:
    kind, colour = figure.kind, figure.colour
    if edit == "axes" and kind not in _WITH_AXES:
        kind = rng.choice(_WITH_AXES)
    source = replace(figure, kind=kind, layout=hash64(figure.seed, "layout"))
    if edit == "recolour":
        colour = rng.choice([name for name in COLOURS if name != colour])
        return EditPair(edit, f"Make it {colour}", source, replace(source, colour=colour))
    if edit == "kind":
        shown = [rng.random() for _ in range(COUNTS[figure.count])]
        values = tuple(value / max(shown) for value in shown) if source.kind != "flow chart" else (1.0,) * len(shown)
        source, kind = replace(source, values=values), rng.choice([name for name in KINDS if name != kind])
        return EditPair(edit, f"Make it a {kind}", source, replace(source, kind=kind, layout=_USUAL))
    if edit == "night":
        return EditPair(edit, "Make it night style", source, replace(source, style="night"))
    if edit == "grid":
        return EditPair(edit, "Add a grid", source, replace(source, grid=True))
    return EditPair(edit, "Remove the axes", source, replace(source, axes=False))


def make_edit_pairs(folder: str | Path, pairs: Sequence[EditPair], figures: Sequence[MiniFigure] = ()) -> Path:
    """Writes pairs as PNG with `metadata.jsonl` (file_name, caption, source_image, edit); complete or not at all.

    Args:
        figures: rows without a source, drawn from their caption alone, after the pairs.

    Raises:
        SciflowError: the folder holds something.
    """

    def drawn() -> Iterator[CaptionedImage]:
        for i, pair in enumerate(pairs):
            more = {"source_image": f"sources/{i:05d}.png", "edit": pair.edit}
            image, source = pair.target.image(), pair.source.image()
            yield CaptionedImage(f"{i:05d}.png", image, pair.instruction, f"{i}", more, source)
        yield from captioned(figures, first=len(pairs))

    return write_figures(folder, drawn())


def edit_figures(folder: str | Path) -> Path:
    """In 64 x 64 pixels: 400 pairs, and 60 figures to be drawn from text, which the model must not forget."""
    sizes = ((64, 64),)
    figures = mini_figures(60, seed=2, sizes=sizes, held_out=None)
    return make_edit_pairs(folder, list(edit_pairs(400, seed=1, sizes=sizes)), list(figures))


def mixed_figures(folder: str | Path) -> Path:
    """Second stage of the course, in 64 x 64 pixels: 400 pairs, and 200 figures to be drawn from text."""
    sizes = ((64, 64),)
    return make_edit_pairs(folder, list(edit_pairs(400, seed=1, sizes=sizes)), ring_figures(200, seed=2, sizes=sizes))
