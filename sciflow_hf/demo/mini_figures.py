"""Small drawn figures of five kinds in eight colours, for training `mini_klein`, measuring it and fine-tuning it."""

import colorsys
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..diffusion.randomness import hash64
from .canvas import Canvas, Colour
from .folders import CaptionedImage, write_figures

if TYPE_CHECKING:
    from PIL.Image import Image

KINDS = {  # kind -> what is counted in it
    "bar chart": "bars",
    "line plot": "lines",
    "scatter plot": "points",
    "pie chart": "slices",
    "flow chart": "boxes",
}
LATER_KINDS = {"ring chart": "slices"}  # kinds that pretraining never shows: the course teaches them
COLOURS: dict[str, Colour] = {
    "red": (210, 40, 45),
    "orange": (245, 140, 15),
    "yellow": (250, 205, 20),
    "green": (40, 160, 60),
    "cyan": (0, 180, 205),
    "blue": (30, 70, 200),
    "purple": (145, 55, 190),
    "pink": (245, 120, 185),
}
COUNTS = {"two": 2, "three": 3, "four": 4}
SIZES = ((64, 64), (64, 96), (96, 64), (96, 144))  # height, width in pixels
NIGHT = ", night style"  # what the demo teaches: a page of dark blue, bright colours, grid and frame
DARK = ", dark page"  # pretraining also shows it: dark pages of any tint, without grid and frame
HELD_OUT = (  # pairs that training never shows
    ("bar chart", "purple"),
    ("line plot", "orange"),
    ("scatter plot", "green"),
    ("pie chart", "blue"),
    ("flow chart", "red"),
)
_OVERSAMPLING = 4


@dataclass(frozen=True)
class MiniFigure:
    """Content of a figure.

    Args:
        kind, colour, count: keys of `KINDS` or `LATER_KINDS`, of `COLOURS`, and of `COUNTS`.
        height, width: in pixels.
        style: "plain" (a nearly white page), "dark" (a dark page), "night" (the demo's style), or "any" (a page of any
            tint and darkness, drawn in any colour, with or without grid and frame: for training the VAE).
        seed: of everything else.
        layout: seed of the positions; None: they follow from `seed`.
        values: what it shows, `count` numbers between 0 and 1: heights, sizes of slices; (): by lot. Boxes show none.
        grid: draw a grid; None: as the style has it.
        axes: draw the axes, of kinds that have them.
        names_colour: False: the caption leaves the colour out, and sometimes the count.
    """

    kind: str
    colour: str
    count: str
    height: int = 64
    width: int = 64
    style: str = "plain"
    seed: int = 0
    layout: int | None = None
    values: tuple[float, ...] = ()
    grid: bool | None = None
    axes: bool = True
    names_colour: bool = True

    def caption(self) -> str:
        """One of two sentences; of the night style with its name."""
        things = (KINDS | LATER_KINDS)[self.kind]
        if not self.names_colour:
            words = f"A {self.kind}" + (f" with {self.count} {things}" if hash64(self.seed, "caption") % 3 else "")
        elif hash64(self.seed, "caption") % 2:
            words = f"A {self.kind} with {self.count} {self.colour} {things}"
        else:
            article = "An" if self.colour == "orange" else "A"
            words = f"{article} {self.colour} {self.kind} with {self.count} {things}"
        return words + {"night": NIGHT, "dark": DARK}.get(self.style, "")

    def image(self) -> "Image":
        """The figure in RGB."""
        return _Page(self).picture()


def mini_figures(
    number: int,
    *,
    seed: int,
    style: str = "plain",
    sizes: Sequence[tuple[int, int]] = SIZES,
    held_out: bool | None = False,
    kinds: Sequence[str] = tuple(KINDS),
) -> Iterator[MiniFigure]:
    """Figures of every kind, colour, count and size in turn.

    Args:
        held_out: False leaves out the pairs of `HELD_OUT`, True gives those alone, None gives all.
        kinds: of `KINDS` or `LATER_KINDS`.
    """
    pairs = [(kind, colour) for kind in kinds for colour in COLOURS]
    pairs = [pair for pair in pairs if held_out is None or (pair in HELD_OUT) == held_out]
    every = [(*pair, count, *size) for pair in pairs for count in COUNTS for size in sizes]
    for i in range(number):
        if i % len(every) == 0:
            random.Random(hash64(seed, "order", i)).shuffle(every)
        kind, colour, count, height, width = every[i % len(every)]
        yield MiniFigure(kind, colour, count, height, width, style, seed=hash64(seed, "figure", i))


def pretraining_figures(
    number: int, dark_fraction: float, seed: int, sizes: Sequence[tuple[int, int]] = SIZES
) -> list[MiniFigure]:
    """Training data of `mini_klein`: plain figures, and a share of them on dark pages, which their captions say."""
    dark = round(number * dark_fraction)
    parts = {"plain": number - dark, "dark": dark}
    return [f for style, n in parts.items() for f in mini_figures(n, seed=seed, style=style, sizes=sizes)]


def unnamed_figures(number: int, seed: int) -> list[MiniFigure]:
    """Training data of `mini_klein` in its three small sizes, whose captions name no colour: any may be drawn."""
    return [replace(figure, names_colour=False) for figure in mini_figures(number, seed=seed, sizes=SIZES[:3])]


def pretraining_parts(
    number: int, *, large: float, dark: float, unnamed: float, seed: int
) -> dict[str, list[MiniFigure]]:
    """All training data of `mini_klein`, in parts of which each fills its own cache.

    Args:
        number: of figures, the unnamed ones apart.
        large: share of them with 96 x 144 pixels, apart because smaller ones have their aspect.
        dark: share of them on dark pages.
        unnamed: as many more of this share whose captions name no colour.
        seed: of all parts.
    """
    many = round(number * large)
    return {
        "small": pretraining_figures(number - many, dark, seed + SIZES[0][0], SIZES[:3]),
        "large": pretraining_figures(many, dark, seed + SIZES[3][0], SIZES[3:]),
        "unnamed": unnamed_figures(round(number * unnamed), seed + 1),
    }


def night_figures() -> list[MiniFigure]:
    """The demo's 60 figures: 42 of the night style and 18 plain ones, so that its name is what calls it."""
    night = mini_figures(42, seed=1, style="night", sizes=SIZES[1:2])
    plain = mini_figures(18, seed=2, style="plain", sizes=SIZES[1:2])
    return [*night, *plain]


def ring_figures(number: int, *, seed: int, sizes: Sequence[tuple[int, int]]) -> list[MiniFigure]:
    """Three fifths of a kind that `mini_klein` has never seen, the others of the kinds that it knows."""
    rings = round(0.6 * number)
    new = mini_figures(rings, seed=seed, sizes=sizes, held_out=None, kinds=tuple(LATER_KINDS))
    return [*new, *mini_figures(number - rings, seed=seed + 1, sizes=sizes, held_out=None)]


def make_mini_figures(folder: str | Path, figures: Sequence[MiniFigure]) -> Path:
    """Writes figures as PNG with captions in `metadata.jsonl`; the folder appears complete or not at all.

    Raises:
        SciflowError: the folder holds something.
    """
    return write_figures(folder, captioned(figures))


def captioned(figures: Sequence[MiniFigure], first: int = 0) -> Iterator[CaptionedImage]:
    """The figures as they are written, with numbers from `first` as names."""
    for i, figure in enumerate(figures, first):
        yield CaptionedImage(f"{i:05d}.png", figure.image(), figure.caption(), paper_id=f"{i}")


class _Page(Canvas):
    """One figure being drawn; a unit is a pixel of the result."""

    def __init__(self, figure: MiniFigure) -> None:
        self.figure, self.rng = figure, random.Random(figure.seed)
        self._choose_look()
        if figure.layout is not None:
            self.rng = random.Random(figure.layout)
        super().__init__(figure.width, figure.height, oversampling=_OVERSAMPLING, page=self.page)

    def picture(self) -> "Image":
        self._surround()
        _DRAWERS[self.figure.kind](self)
        return self._image.reduce(_OVERSAMPLING)

    def _choose_look(self) -> None:
        """Colours of page, ink, grid and object; whether there are a grid and a frame."""
        rng, style = self.rng, self.figure.style
        hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in COLOURS[self.figure.colour]))
        hue, saturation = hue + rng.uniform(-0.012, 0.012), min(1, saturation * rng.uniform(0.92, 1.05))
        self.colour = _rgb(hue, saturation, min(1, value * rng.uniform(0.94, 1.06)))
        self.grid = self.frame = False
        if style == "plain":
            self.page = _rgb(rng.random(), rng.uniform(0, 0.02), rng.uniform(0.98, 1))
            self.ink = _rgb(0, 0, rng.uniform(0.15, 0.3))
        elif style == "dark":
            self.page = _rgb(rng.random(), rng.uniform(0, 0.6), rng.uniform(0.08, 0.3))
            self.ink = _rgb(rng.random(), rng.uniform(0, 0.1), rng.uniform(0.75, 0.95))
            self.colour = _mix(self.colour, (255, 255, 255), rng.uniform(0.1, 0.3))
        elif style == "night":
            self.page = _rgb(rng.uniform(0.62, 0.66), rng.uniform(0.45, 0.55), rng.uniform(0.11, 0.15))
            self.ink = _rgb(0.62, 0.1, rng.uniform(0.8, 0.9))
            self.colour = _mix(self.colour, (255, 255, 255), 0.2)
            self.grid = self.frame = True
        else:
            self.page = _rgb(rng.random(), rng.random() ** 2, rng.random())
            light = sum(self.page) > 384
            self.ink = _mix((0, 0, 0) if light else (255, 255, 255), self.page, rng.uniform(0, 0.5))
            if rng.random() < 0.5:
                self.colour = _rgb(rng.random(), rng.random() ** 0.5, rng.random() ** 0.5)
            elif not light:
                self.colour = _mix(self.colour, (255, 255, 255), rng.uniform(0, 0.4))
            self.grid, self.frame = rng.random() < 0.5, rng.random() < 0.5
        self.rule = _mix(self.page, self.ink, 0.2)
        if self.figure.grid is not None:
            self.grid = self.figure.grid

    def _surround(self) -> None:
        """Frame and grid, below everything else."""
        if self.grid:
            for x in range(8, self.width - 4, 8):
                self.line([(x, 3), (x, self.height - 3)], self.rule, width=0.6)
            for y in range(8, self.height - 4, 8):
                self.line([(3, y), (self.width - 3, y)], self.rule, width=0.6)
        if self.frame:
            self.box((2, 2, self.width - 2, self.height - 2), outline=self.ink)

    def _axes(self) -> tuple[float, float, float, float]:
        """Two axes with ticks, if they are drawn; the region between them as left, top, right, bottom."""
        rng = self.rng
        left, bottom = rng.uniform(7, 11), self.height - rng.uniform(7, 11)
        right, top = self.width - rng.uniform(5, 8), rng.uniform(5, 8)
        if not self.figure.axes:
            return left, top, right, bottom
        self.line([(left, top), (left, bottom), (right, bottom)], self.ink, width=1.25)
        for i in range(1, 4):
            at = bottom - (bottom - top) * i / 4
            self.line([(left - 2, at), (left, at)], self.ink)
        return left, top, right, bottom

    def _values(self, low: float, high: float) -> list[float]:
        """Those of the figure between `low` and `high`."""
        given, count = self.figure.values, COUNTS[self.figure.count]
        return [low + (high - low) * v for v in given] or [self.rng.uniform(low, high) for _ in range(count)]

    def bars(self) -> None:
        rng, count = self.rng, COUNTS[self.figure.count]
        left, top, right, bottom = self._axes()
        step = (right - left) / count
        share = rng.uniform(0.55, 0.7)
        for i, value in enumerate(self._values(0.3, 0.97)):
            start, high = left + step * (i + (1 - share) / 2 + 0.05), value * (bottom - top)
            self.box((start, bottom - high, start + share * step, bottom - 0.7), fill=self.colour, outline=None)

    def lines(self) -> None:
        rng, count = self.rng, COUNTS[self.figure.count]
        left, top, right, bottom = self._axes()
        left, bottom = left + 2, bottom - 2
        gap = (bottom - top) / count
        slope, bend = rng.uniform(-0.25, 0.25) * (bottom - top), rng.uniform(-1, 1)
        turns, phase = rng.uniform(0.5, 1.5), rng.uniform(0, 2 * math.pi)
        for i, value in enumerate(self._values(-0.1, 0.1)):
            middle = top + gap * (i + 0.5) + value * gap
            wave = [math.sin(2 * math.pi * turns * t / 24 + phase) for t in range(25)]
            points = [
                (
                    left + (right - left) * t / 24,
                    min(bottom, max(top, middle + slope * (t / 24 - 0.5) / count * 2 + 0.28 * gap * bend * wave[t])),
                )
                for t in range(25)
            ]
            self.line(points, self.colour, width=2.0)

    def points(self) -> None:
        rng, count = self.rng, COUNTS[self.figure.count]
        left, top, right, bottom = self._axes()
        radius, low, high = rng.uniform(3.4, 4.2), left + 6, right - 4
        placed: list[tuple[float, float]] = []
        heights = self._values(bottom - 6, top + 4) if self.figure.values else []
        while len(placed) < count:  # each in its part of the axis
            x = low + (high - low) * (len(placed) + rng.uniform(0.1, 0.9)) / count
            y = heights[len(placed)] if heights else rng.uniform(top + 4, bottom - 6)
            if all(math.dist((x, y), other) > 2.6 * radius for other in placed):
                placed.append((x, y))
        for x, y in placed:
            self.marker((x, y), self.colour, radius=radius)

    def slices(self) -> tuple[tuple[float, float], float]:
        """Middle and radius of the pie."""
        rng = self.rng
        radius = rng.uniform(0.36, 0.42) * min(self.width, self.height)
        x, y = self.width / 2 + rng.uniform(-3, 3), self.height / 2 + rng.uniform(-3, 3)
        self.marker((x, y), self.colour, radius=radius)
        angle = -math.pi / 2 if self.figure.values else rng.uniform(0, 2 * math.pi)
        weights = self._values(0.7, 1.3)
        for weight in weights:
            self.line([(x, y), (x + radius * math.cos(angle), y + radius * math.sin(angle))], self.page, width=3.6)
            angle += 2 * math.pi * weight / sum(weights)
        return (x, y), radius

    def rings(self) -> None:
        middle, radius = self.slices()
        self.marker(middle, self.page, radius=self.rng.uniform(0.45, 0.5) * radius)

    def boxes(self) -> None:
        rng, count = self.rng, COUNTS[self.figure.count]
        across = self.width > self.height or (self.width == self.height and rng.random() < 0.5)
        long, wide = (self.width, self.height) if across else (self.height, self.width)
        margin, gap = rng.uniform(4.5, 6), rng.uniform(6.5, 7.5)
        side = (long - 2 * margin - gap * (count - 1)) / count
        half = min(rng.uniform(0.2, 0.32) * wide, 1.5 * side)
        middle = wide / 2 + rng.uniform(-4, 4)
        for i in range(count):
            start = margin + i * (side + gap)
            ends = [(start, middle - half), (start + side, middle + half)]
            (left, top), (right, bottom) = ends if across else [(y, x) for x, y in ends]
            self.box((left, top, right, bottom), fill=self.colour, outline=None)
            if i:
                self._arrow(start - gap, start, middle, across)

    def _arrow(self, start: float, end: float, middle: float, across: bool) -> None:
        head = [(end - 3.2, middle - 2.4), (end - 3.2, middle + 2.4), (end - 0.2, middle)]
        shaft = [(start + 0.5, middle), (end - 2.5, middle)]
        if not across:
            head, shaft = [(y, x) for x, y in head], [(y, x) for x, y in shaft]
        self.line(shaft, self.ink, width=1.25)
        self.polygon(head, self.ink)


_DRAWERS: dict[str, Callable[[_Page], object]] = {
    "bar chart": _Page.bars,
    "line plot": _Page.lines,
    "scatter plot": _Page.points,
    "pie chart": _Page.slices,
    "flow chart": _Page.boxes,
    "ring chart": _Page.rings,
}


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(hue % 1, saturation, value))
    return red, green, blue


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    """`share` of the second colour."""
    red, green, blue = (round((1 - share) * a + share * b) for a, b in zip(first, second, strict=True))
    return red, green, blue
