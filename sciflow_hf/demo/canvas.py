"""A drawing surface for figures: smooth lines, text, axes with ticks, arrows. PIL only."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

Colour = tuple[int, int, int]
Point = tuple[float, float]
Place = Callable[[float, float], Point]  # from data coordinates to the page
Box = tuple[float, float, float, float]  # left, top, right, bottom

INK, WHITE = (40, 40, 40), (255, 255, 255)
GRID = (222, 222, 222)
COLOURS: dict[str, Colour] = {
    "blue": (31, 119, 180),
    "orange": (255, 127, 14),
    "green": (44, 160, 44),
    "red": (204, 51, 51),
    "purple": (128, 90, 180),
    "teal": (20, 150, 150),
    "grey": (120, 120, 120),
    "brown": (140, 86, 75),
}


class Canvas:
    """A page of `width` x `height` units; lengths and positions are in units, y grows downwards.

    Drawn larger than the picture that `picture()` gives, so that edges come out smooth.

    Args:
        width, height: size in units.
        pixels_per_unit: 1.0 gives a picture of `width` x `height` pixels.
        oversampling: how many times larger it is drawn.
        page: its colour.
    """

    def __init__(
        self, width: int, height: int, *, pixels_per_unit: float = 1.0, oversampling: int = 2, page: Colour = WHITE
    ) -> None:
        from PIL import Image, ImageDraw

        self.width, self.height = width, height
        self._size = (round(width * pixels_per_unit), round(height * pixels_per_unit))
        self._scale = oversampling * pixels_per_unit
        self._image = Image.new("RGB", (self._size[0] * oversampling, self._size[1] * oversampling), page)
        self._draw = ImageDraw.Draw(self._image)

    def picture(self) -> "Image":
        """The page as an RGB image."""
        from PIL import Image

        return self._image.resize(self._size, Image.Resampling.BOX)

    def _px(self, points: Sequence[Point]) -> list[Point]:
        return [(x * self._scale, y * self._scale) for x, y in points]

    def line(self, points: Sequence[Point], colour: Colour = INK, *, width: float = 1.0) -> None:
        """An open polyline."""
        thickness = max(1, round(width * self._scale))
        self._draw.line(self._px(points), fill=colour, width=thickness, joint="curve")

    def dashed(self, start: Point, end: Point, colour: Colour = INK, *, width: float = 1.0) -> None:
        """A straight line of dashes four units long."""
        length = max(math.dist(start, end), 1e-6)
        step = ((end[0] - start[0]) / length, (end[1] - start[1]) / length)
        for i in range(0, int(length), 7):
            stop = min(i + 4, length)
            ends = [(start[0] + at * step[0], start[1] + at * step[1]) for at in (i, stop)]
            self.line(ends, colour, width=width)

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        """A filled polygon without an outline."""
        self._draw.polygon(self._px(points), fill=fill)

    def box(
        self,
        box: Box,
        *,
        fill: Colour | None = None,
        outline: Colour | None = INK,
        width: float = 1.0,
        radius: float = 0.0,
    ) -> None:
        """A rectangle, with round corners where `radius` is given."""
        corners = [value * self._scale for value in box]
        thick = max(1, round(width * self._scale)) if outline else 0
        if radius:
            self._draw.rounded_rectangle(corners, radius * self._scale, fill=fill, outline=outline, width=thick)
        else:
            self._draw.rectangle(corners, fill=fill, outline=outline, width=thick)

    def marker(self, at: Point, colour: Colour, *, radius: float = 2.5, shape: str = "circle") -> None:
        """A filled data point: "circle", "square" or "triangle"."""
        (x, y), r = at, radius
        if shape == "triangle":
            self.polygon([(x, y - 1.2 * r), (x - 1.1 * r, y + 0.8 * r), (x + 1.1 * r, y + 0.8 * r)], colour)
        elif shape == "square":
            self.polygon([(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)], colour)
        else:
            self._draw.ellipse([value * self._scale for value in (x - r, y - r, x + r, y + r)], fill=colour)

    def text(
        self,
        at: Point,
        words: str,
        *,
        size: float = 9.0,
        anchor: str = "mm",
        colour: Colour = INK,
        upright: bool = False,
    ) -> None:
        """One line of text; `anchor` as in PIL. `upright` turns it by 90 degrees, centred on `at`."""
        from PIL import Image, ImageDraw, ImageFont

        font = ImageFont.load_default(max(4.0, size * self._scale))
        if not upright:
            self._draw.text(self._px([at])[0], words, fill=colour, font=font, anchor=anchor)
            return
        left, top, right, bottom = font.getbbox(words)
        mask = Image.new("L", (math.ceil(right - left) + 4, math.ceil(bottom - top) + 4))
        ImageDraw.Draw(mask).text((2 - left, 2 - top), words, fill=255, font=font)
        mask = mask.transpose(Image.Transpose.ROTATE_90)
        corner = (round(at[0] * self._scale - mask.width / 2), round(at[1] * self._scale - mask.height / 2))
        self._image.paste(colour, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)

    def arrow(self, start: Point, end: Point, colour: Colour = INK, *, width: float = 1.2) -> None:
        """A straight arrow with a filled head at `end`."""
        angle = math.atan2(end[1] - start[1], end[0] - start[0])
        head = 5.0
        neck = (end[0] - head * math.cos(angle), end[1] - head * math.sin(angle))
        self.line([start, neck], colour, width=width)
        dx, dy = 0.5 * head * math.sin(angle), -0.5 * head * math.cos(angle)
        self.polygon([end, (neck[0] + dx, neck[1] + dy), (neck[0] - dx, neck[1] - dy)], colour)

    def axes(
        self,
        box: Box,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        *,
        x_label: str = "",
        y_label: str = "",
        x_names: Sequence[str] | None = None,
        grid: bool = True,
        frame: bool = False,
        size: float = 9.0,
    ) -> Place:
        """Axes with ticks and labels around `box`.

        Args:
            x_names: names instead of numbers, at x = 0, 1, 2, ...
            frame: a closed frame instead of two axes.

        Returns:
            The map from data coordinates to the page.
        """
        left, top, right, bottom = box
        (x_low, x_high), (y_low, y_high) = x_range, y_range

        def place(x: float, y: float) -> Point:
            return (
                left + (x - x_low) / (x_high - x_low) * (right - left),
                bottom - (y - y_low) / (y_high - y_low) * (bottom - top),
            )

        for y in ticks(y_low, y_high, count=max(2, int((bottom - top) / 32))):
            at = place(x_low, y)[1]
            if grid:
                self.line([(left, at), (right, at)], GRID, width=0.6)
            self.line([(left - 3, at), (left, at)], width=0.8)
            self.text((left - 5, at), f"{y:g}", size=size - 1, anchor="rm")
        if x_names is None:
            marks = [(x, f"{x:g}") for x in ticks(x_low, x_high, count=max(2, int((right - left) / 42)))]
        else:
            marks = [(float(i), name) for i, name in enumerate(x_names)]
        for x, name in marks:
            at = place(x, y_low)[0]
            if grid and x_names is None:
                self.line([(at, top), (at, bottom)], GRID, width=0.6)
            self.line([(at, bottom), (at, bottom + 3)], width=0.8)
            self.text((at, bottom + 5), name, size=size - 1, anchor="mt")
        if frame:
            self.box(box, width=0.9)
        else:
            self.line([(left, top), (left, bottom), (right, bottom)], width=0.9)
        self.text(((left + right) / 2, bottom + 2.6 * size), x_label, size=size, anchor="mm")
        if y_label:
            self.text((left - 3.0 * size, (top + bottom) / 2), y_label, size=size, upright=True)
        return place

    def legend(
        self, at: Point, entries: Sequence[tuple[str, Colour]], *, kind: str = "line", size: float = 8.0
    ) -> None:
        """Framed names next to their colours; `at` is the top left corner, `kind` "line" or "patch"."""
        (x, y), row = at, size + 3
        width = 24 + 0.58 * size * max(len(name) for name, _ in entries)
        bottom = y + row * len(entries) + 4
        self.box((x, y, x + width, bottom), fill=(255, 255, 255), outline=(190, 190, 190), width=0.7)
        for i, (name, colour) in enumerate(entries):
            middle = y + 2 + row * (i + 0.5)
            if kind == "line":
                self.line([(x + 4, middle), (x + 17, middle)], colour, width=1.8)
            else:
                self.box((x + 6, middle - 3, x + 15, middle + 3), fill=colour, outline=None)
            self.text((x + 21, middle), name, size=size, anchor="lm")


def pale(colour: Colour, share: int) -> Colour:
    """One part of `share` of the colour on white."""
    red, green, blue = (255 - (255 - c) // share for c in colour)
    return red, green, blue


def ticks(low: float, high: float, *, count: int) -> list[float]:
    """Round numbers in [low, high], about `count` of them, at steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]
