"""Kinds, counts and colours of small drawn charts, by programmes and not by a network: runs, components, rings, hues.

Written for the figures of `sciflow_hf.demo.mini_figures`: things of one saturated colour on a page of little colour,
with axes and arrows in ink. They are exact on what is drawn, so a count that is wrong is that of the picture.
"""

import colorsys
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from ..errors import SciflowError

KINDS = ("bar chart", "line plot", "scatter plot", "pie chart", "flow chart", "ring chart")
_HOLE = 0.3  # of a ring's radius: nothing is coloured there
_RINGS = (0.45, 0.55, 0.65, 0.75)  # of a pie's radius
_ANGLES = 720
_STROKE, _MARKER = 5, 13  # pixels: a line is no thicker, a point no larger
_LEAST = 40  # pixels of a chart


def count_things(image: Image.Image | np.ndarray, kind: str) -> int:
    """How many bars, lines, points, slices or boxes a chart has; 0 where nothing is drawn in colour.

    Args:
        image: RGB, (H, W, 3) in 0 to 255 if an array.
        kind: one of `KINDS`.
    """
    if kind not in _COUNTERS:
        raise SciflowError(f"`kind` {kind!r}: use one of {', '.join(_COUNTERS)}.")
    mask = coloured(image)
    return _COUNTERS[kind](mask) if mask.any() else 0


def kind_of(image: Image.Image | np.ndarray) -> str | None:
    """Which of `KINDS` a chart is, from the shapes of what is coloured and the ink between; None for none of them.

    A pie fills the ellipse in its frame, a ring all of it but the middle; lines are thin and wide, points small in both
    directions; bars and boxes are told apart by the ink between them, which is an axis at their feet or an arrow at
    half their height.

    Args:
        image: RGB, (H, W, 3) in 0 to 255 if an array.
    """
    mask = coloured(image)
    if mask.sum() < _LEAST:
        return None
    high, wide = _median_run(mask.T), _median_run(mask)
    if high <= _STROKE:
        return "line plot"
    is_round = _is_round(mask)
    if is_round and _on_circle(mask, _HOLE).mean() < 0.2:
        return "ring chart"
    if max(high, wide) <= _MARKER:
        return "scatter plot"
    return "pie chart" if is_round else _bars_or_boxes(image, mask)


def coloured(image: Image.Image | np.ndarray) -> np.ndarray:
    """Which pixels are of the coloured things: (H, W), bool.

    Their chroma, the largest less the smallest of R, G and B, is more than half of the strongest (99th percentile)
    above that of the page (median along the border); a picture whose strongest stays below 40 above it has none.
    """
    pixels = np.asarray(image, dtype=np.float64)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise SciflowError(f"`image` has shape {pixels.shape}, but is (height, width, 3): convert it to RGB.")
    chroma = pixels.max(2) - pixels.min(2)
    page = np.median(np.concatenate([chroma[0], chroma[-1], chroma[:, 0], chroma[:, -1]]))
    strongest = np.percentile(chroma, 99) - page
    return chroma - page > max(strongest, 40) / 2


def colour_of(image: Image.Image | np.ndarray, colours: Mapping[str, tuple[int, int, int]]) -> str | None:
    """The one of `colours` (name -> RGB) whose hue is nearest to that of what is coloured; None where nothing is.

    Its hue is that of the median of its pixels.

    Args:
        image: RGB, (H, W, 3) in 0 to 255 if an array.
        colours: saturated ones.
    """
    mask = coloured(image)
    if not mask.any():
        return None
    found = _hue(np.median(np.asarray(image, dtype=np.float64)[mask], axis=0))
    distance = {name: abs((_hue(colour) - found + 0.5) % 1 - 0.5) for name, colour in colours.items()}
    return min(distance, key=lambda name: distance[name])


def closeness_of_hue(image: Image.Image | np.ndarray, colour: tuple[int, int, int]) -> float:
    """How near what is coloured is to the hue of `colour`: 2^(-d / 30), the mean over its pixels; 0 where nothing is.

    d is the distance on the circle of hues in degrees: 1 for the hue itself, half as much for every 30 degrees from it.

    Args:
        image: RGB, (H, W, 3) in 0 to 255 if an array.
        colour: RGB in 0 to 255, saturated.
    """
    from matplotlib.colors import rgb_to_hsv

    mask = coloured(image)
    if mask.sum() < _LEAST:
        return 0.0
    hues = rgb_to_hsv(np.asarray(image, dtype=np.float64)[mask] / 255)[:, 0]
    return float(np.exp2(-360 / 30 * np.abs((hues - _hue(colour) + 0.5) % 1 - 0.5)).mean())


def _hue(colour: np.ndarray | tuple[int, int, int]) -> float:
    """In turns."""
    red, green, blue = (float(value) / 255 for value in colour)
    return colorsys.rgb_to_hsv(red, green, blue)[0]


def runs(row: np.ndarray, *, at_least: int = 1) -> int:
    """Number of stretches of True in (N,) that have this length or more."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
    return int((edges[1::2] - edges[::2] >= at_least).sum())


def components(mask: np.ndarray, *, at_least: int = 1) -> int:
    """Number of 8-connected regions of (H, W) with this many pixels or more."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # each pixel takes the largest label around it, until none changes
        padded = np.pad(labels, 1)
        around = [padded[y : y + labels.shape[0], x : x + labels.shape[1]] for y in range(3) for x in range(3)]
        spread = np.where(mask, np.maximum.reduce(around), 0)
        if np.array_equal(spread, labels):
            break
        labels = spread
    return int((np.unique(labels[mask], return_counts=True)[1] >= at_least).sum())


def _is_round(mask: np.ndarray) -> bool:
    """Whether most of the ellipse in the frame of what is True is filled, and little outside of it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    window = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = window.shape
    y, x = np.ogrid[:height, :width]
    inside = ((2 * y + 1) / height - 1) ** 2 + ((2 * x + 1) / width - 1) ** 2 <= 1.1
    if max(height, width) > 1.5 * min(height, width):
        return False
    return bool(window[inside].mean() > 0.5 and window[~inside].mean() < 0.2)


def _bars_or_boxes(image: Image.Image | np.ndarray, mask: np.ndarray) -> str | None:
    """Boxes stand in a stack, or in a row with more ink between them at half height than at the foot; None of one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.sum(0) >= 3)
    gaps = np.setdiff1d(np.arange(columns[0], columns[-1]), columns)
    if not len(gaps):
        return "flow chart" if _boxes(mask) > 1 else None
    pixels = np.asarray(image, dtype=np.float64)[:, gaps]
    ink = np.abs(pixels - np.median(pixels, axis=(0, 1))).mean((1, 2))
    middle, foot = (rows[0] + rows[-1]) // 2, rows[-1]
    return "flow chart" if ink[max(0, middle - 3) : middle + 4].max() > ink[foot - 1 : foot + 4].max() else "bar chart"


def _median_run(mask: np.ndarray) -> float:
    """Length of the run in which the median True pixel of (R, N) lies, along the rows."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))))
    lengths = np.argwhere(edges == -1)[:, 1] - np.argwhere(edges == 1)[:, 1]
    return float(np.median(np.repeat(lengths, lengths)))


def _bars(mask: np.ndarray) -> int:
    return runs(mask.sum(0) >= 3, at_least=2)


def _boxes(mask: np.ndarray) -> int:
    """They stand in a row or in a column."""
    return max(runs(mask.sum(axis) >= 3, at_least=2) for axis in (0, 1))


def _lines(mask: np.ndarray) -> int:
    """The commonest number of runs over the columns that have any."""
    found = np.array([runs(column) for column in mask.T])
    return int(np.bincount(found[found > 0]).argmax())


def _points(mask: np.ndarray) -> int:
    return components(mask, at_least=6)


def _slices(mask: np.ndarray) -> int:
    """The commonest number of gaps along rings about the middle; a disc without any is one slice."""
    found = []
    for ring in (_on_circle(mask, share) for share in _RINGS):
        found.append(max(1, runs(~np.roll(ring, -int(ring.argmax())))))  # which begins within a slice
    return int(np.bincount(found).argmax())


def _on_circle(mask: np.ndarray, share: float) -> np.ndarray:
    """The values on the circle about the middle of the True ones, with this share of their radius: (angles,)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    y, x = (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2
    angles = 2 * np.pi * np.arange(_ANGLES) / _ANGLES
    radius = share * min(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1) / 2
    return mask[np.rint(y + radius * np.sin(angles)).astype(int), np.rint(x + radius * np.cos(angles)).astype(int)]


_COUNTERS: dict[str, Callable[[np.ndarray], int]] = {
    "bar chart": _bars,
    "line plot": _lines,
    "scatter plot": _points,
    "pie chart": _slices,
    "flow chart": _boxes,
    "ring chart": _slices,
}
