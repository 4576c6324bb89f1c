"""Drawn scientific figures with captions: plots, charts, heat maps and diagrams, from a seed."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import SciflowError
from .canvas import COLOURS, Canvas
from .folders import CaptionedImage, write_figures
from .kinds import KINDS

PAGE_SIZES = ((320, 240), (240, 320), (384, 192))  # 4:3, 3:4 and 2:1, none square
FIGURES_PER_PAPER = 3


def make_figures(
    folder: str | Path,
    *,
    num_figures: int = 100,
    seed: int = 0,
    page_sizes: Sequence[tuple[int, int]] = PAGE_SIZES,
    pixels_per_unit: float = 1.0,
) -> Path:
    """Draws figures into an imagefolder: PNG files and `metadata.jsonl` (file_name, caption, paper_id).

    The folder appears complete or not at all. One seed gives the same bytes.

    Args:
        folder: where to write; must not exist or be empty.
        num_figures: how many; three belong to one paper.
        page_sizes: (width, height) that the figures cycle through, in units.
        pixels_per_unit: 1.0 for readable figures, less for tests.

    Returns:
        The folder.

    Raises:
        SciflowError: the folder holds something, or `num_figures` is not positive.
    """
    if num_figures < 1:
        raise SciflowError(f"`num_figures` is {num_figures}; it must be at least 1.")
    drawn = draw_figures(num_figures, seed=seed, page_sizes=page_sizes, pixels_per_unit=pixels_per_unit)
    return write_figures(folder, drawn)


def draw_figures(
    num_figures: int,
    *,
    seed: int = 0,
    page_sizes: Sequence[tuple[int, int]] = PAGE_SIZES,
    pixels_per_unit: float = 1.0,
) -> Iterator[CaptionedImage]:
    """The figures of `make_figures` one by one; a figure depends on (seed, its number) only."""
    for i in range(num_figures):
        paper = i // FIGURES_PER_PAPER
        style = random.Random(f"{seed} paper {paper}")  # figures of one paper share their colours
        names = style.sample(list(COLOURS), 4)
        rng = random.Random(f"{seed} figure {i}")
        width, height = page_sizes[rng.randrange(len(page_sizes))]
        canvas = Canvas(width, height, pixels_per_unit=pixels_per_unit)
        # Steps of 5 through 12 kinds reach each once a round; the shift pairs them anew in every round.
        draw = KINDS[(5 * i + i // len(KINDS)) % len(KINDS)]
        caption, name = draw(canvas, rng, names), f"demo-{paper:03d}_fig{i % FIGURES_PER_PAPER + 1}.png"
        yield CaptionedImage(name, canvas.picture(), caption, paper_id=f"demo-{paper:03d}")
