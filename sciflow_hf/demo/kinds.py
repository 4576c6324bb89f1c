"""The kinds of drawn figures: each function draws on a canvas and returns the caption of what it drew."""

import math
import random
from collections.abc import Callable, Sequence

from .canvas import COLOURS, GRID, INK, WHITE, Box, Canvas, Colour, Place, pale
from .diagrams import block_diagram, flow_chart, network

MEASURES = (
    ("time (s)", "voltage (mV)"), ("epoch", "accuracy"), ("temperature (K)", "resistivity"),
    ("distance (mm)", "intensity"), ("frequency (Hz)", "power"), ("dose (mg)", "response"),
    ("energy (eV)", "counts"), ("concentration", "absorbance"), ("depth (m)", "pressure"),
)  # fmt: skip
GROUPS = ("control", "treated", "baseline", "ours", "ablation", "mutant", "wild type", "model A", "model B")
CATEGORIES = (
    ["A", "B", "C", "D", "E", "F"],
    ["2019", "2020", "2021", "2022", "2023", "2024"],
    ["S1", "S2", "S3", "S4", "S5", "S6"],
)


def _frame(canvas: Canvas, *, right: float = 10.0) -> Box:
    """Place of the axes on a page with room for tick labels and axis titles."""
    return (46.0, 14.0, canvas.width - right, canvas.height - 34.0)


def _named_axes(canvas: Canvas, names: list[str], top: float, y_label: str, *, frame: bool = False) -> Place:
    """Axes with a group at x = 0, 1, 2, ..."""
    across = (-0.6, len(names) - 0.4)
    return canvas.axes(_frame(canvas), across, (0, top), y_label=y_label, x_names=names, x_label="group", frame=frame)


def _key(groups: Sequence[str], names: Sequence[str]) -> list[tuple[str, Colour]]:
    """Entries of a legend: as many as there are groups."""
    return [(group, COLOURS[name]) for group, name in zip(groups, names, strict=False)]


def line_plot(canvas: Canvas, rng: random.Random, names: Sequence[str]) -> str:
    """Curves that rise, decay or swing."""
    x_label, y_label = rng.choice(MEASURES)
    groups = rng.sample(GROUPS, rng.randint(2, 3))
    end, top = rng.choice((10, 20, 50)), rng.choice((1.0, 5.0, 80.0))
    form = rng.choice(("saturating", "decaying", "oscillating"))
    place = canvas.axes(_frame(canvas), (0, end), (0, top), x_label=x_label, y_label=y_label)
    for k, (_, name) in enumerate(zip(groups, names, strict=False)):
        rate, height = rng.uniform(2, 8) / end, rng.uniform(0.55, 0.92) - 0.1 * k
        wobble = rng.uniform(0.005, 0.02)
        points = []
        for i in range(61):
            x = end * i / 60
            y = {
                "saturating": height * (1 - math.exp(-rate * x)),
                "decaying": height * math.exp(-rate * x) + 0.04,
                "oscillating": 0.5 + 0.45 * height * math.sin(3 * rate * x + k) * math.exp(-0.3 * rate * x),
            }[form]
            points.append(place(x, top * min(0.99, max(0.01, y + rng.gauss(0, wobble)))))
        canvas.line(points, COLOURS[name], width=1.8)
    corner = (canvas.width - 82.0, canvas.height - 84.0 if form == "saturating" else 18.0)
    canvas.legend(corner, _key(groups, names))
    shown = ", ".join(f"{g} ({n})" for g, n in zip(groups, names, strict=False))
    return f"Line plot of {y_label} against {x_label} with {len(groups)} {form} curves: {shown}."


def scatter_plot(canvas: Canvas, rng: random.Random, names: Sequence[str]) -> str:
    """Two clouds with a fitted line."""
    x_label, y_label = rng.choice(MEASURES)
    count, slope, shapes = rng.choice((30, 50, 80)), rng.choice((-0.6, 0.5, 0.8)), ("circle", "triangle")
    place = canvas.axes(_frame(canvas), (0, 10), (0, 10), x_label=x_label, y_label=y_label, frame=True)
    for name, shape, lift in zip(names[:2], shapes, (0.8, -0.8), strict=True):
        for _ in range(count // 2):
            x = rng.uniform(0.4, 9.6)
            y = 5 + slope * (x - 5) + lift + rng.gauss(0, 0.8)
            canvas.marker(place(x, min(9.7, max(0.3, y))), COLOURS[name], radius=2.4, shape=shape)
    canvas.dashed(place(0.3, 5 + slope * -4.7), place(9.7, 5 + slope * 4.7), width=1.2)
    way = "rising" if slope > 0 else "falling"
    return (
        f"Scatter plot of {y_label} against {x_label}, {count} points in {names[0]} and {names[1]}, "
        f"with a {way} dashed fit of slope {slope}."
    )


def bar_chart(canvas: Canvas, rng: random.Random, names: Sequence[str]) -> str:
    """Bars, one or two to a category, with error bars."""
    categories, (_, y_label) = rng.choice(CATEGORIES)[: rng.randint(3, 6)], rng.choice(MEASURES)
    top, groups = rng.choice((1.0, 10.0, 100.0)), rng.sample(GROUPS, rng.randint(1, 2))
    place = _named_axes(canvas, categories, top, y_label)
    highest = 0.85 if len(groups) == 1 else 0.66  # room for the legend
    values = [[top * rng.uniform(0.2, highest) for _ in categories] for _ in groups]
    width = 0.7 / len(groups)
    for k, (row, name) in enumerate(zip(values, names, strict=False)):
        for i, value in enumerate(row):
            left = i - 0.35 + k * width
            (x0, y0), (x1, y1) = place(left, value), place(left + width, 0)
            canvas.box((x0, y0, x1, y1), fill=COLOURS[name], outline=INK, width=0.6)
            spread = top * rng.uniform(0.02, 0.06)
            middle = left + width / 2
            _error_bar(canvas, place(middle, value - spread), place(middle, value + spread))
    if len(groups) == 2:
        canvas.legend((52, 16), _key(groups, names), kind="patch")
    best = max(range(len(categories)), key=lambda i: values[0][i])
    shown = " and ".join(f"{g} ({n})" for g, n in zip(groups, names, strict=False))
    return (
        f"Bar chart of {y_label} in {len(categories)} groups for {shown}; "
        f"the highest {names[0]} bar is {categories[best]} at {values[0][best]:.3g}."
    )


def _error_bar(canvas: Canvas, low: tuple[float, float], high: tuple[float, float], colour: Colour = INK) -> None:
    canvas.line([low, high], colour, width=1.0)
    for x, y in (low, high):
        canvas.line([(x - 3, y), (x + 3, y)], colour, width=1.0)


def histogram(canvas: Canvas, rng: random.Random, names: Sequence[str]) -> str:
    """A distribution with a bell curve over it."""
    x_label, mean, spread = rng.choice(MEASURES)[0], rng.choice((3.0, 5.0, 6.5)), rng.choice((0.8, 1.2, 1.8))
    samples = [rng.gauss(mean, spread) for _ in range(400)]
    counts = [sum(1 for s in samples if i * 0.5 <= s < (i + 1) * 0.5) for i in range(20)]
    highest = 1.15 * max(counts)
    place = canvas.axes(_frame(canvas), (0, 10), (0, highest), x_label=x_label, y_label="count", grid=False)
    for i, count in enumerate(counts):
        if count:
            (x0, y0), (x1, y1) = place(i * 0.5, count), place((i + 1) * 0.5, 0)
            canvas.box((x0, y0, x1, y1), fill=COLOURS[names[0]], outline=WHITE, width=0.6)
    peak = 400 * 0.5 / (spread * math.sqrt(2 * math.pi))
    curve = [place(x / 10, peak * math.exp(-((x / 10 - mean) ** 2) / (2 * spread**2))) for x in range(101)]
    canvas.line([p for p in curve if p[1] > 14], COLOURS[names[1]], width=1.8)
    return (
        f"Histogram of {x_label}, 400 samples in {names[0]} bins with a {names[1]} normal curve, "
        f"mean {mean} and standard deviation {spread}."
    )


def box_plot(canvas: Canvas, rng: random.Random, names: Sequence[str]) -> str:
    """Median, quartiles, whiskers and outliers of some groups."""
    groups, (_, y_label) = rng.choice(CATEGORIES)[: rng.randint(3, 5)], rng.choice(MEASURES)
    place = _named_axes(canvas, groups, 10, y_label, frame=True)
    medians = [rng.uniform(3, 7) for _ in groups]
    for i, median in enumerate(medians):
        low, high = median - rng.uniform(0.5, 1.4), median + rng.uniform(0.5, 1.4)
        _error_bar(canvas, place(i, low - rng.uniform(0.4, 1.4)), place(i, high + rng.uniform(0.4, 1.4)))
        (x0, y0), (x1, y1) = place(i - 0.27, high), place(i + 0.27, low)
        canvas.box((x0, y0, x1, y1), fill=COLOURS[names[i % 2]], width=0.9)
        canvas.line([place(i - 0.27, median), place(i + 0.27, median)], WHITE, width=1.8)
        for _ in range(rng.randint(0, 2)):
            outlier = rng.choice((rng.uniform(0.4, 1.0), rng.uniform(9.0, 9.6)))
            canvas.marker(place(i, outlier), INK, radius=1.6)
    best = max(range(len(groups)), key=medians.__getitem__)
    return (
        f"Box plot of {y_label} for {len(groups)} groups in {names[0]} and {names[1]}; "
        f"{groups[best]} has the highest median, {medians[best]:.1f}."
    )


def error_bars(canvas: Canvas, rng: random.Random, names: Sequence[str]) -> str:
    """Means with error bars joined by a line, and a shaded band."""
    x_label, y_label = rng.choice(MEASURES)
    count, falling = rng.randint(6, 9), rng.random() < 0.5
    place = canvas.axes(_frame(canvas), (0, count + 1), (0, 1), x_label=x_label, y_label=y_label)
    means = [0.15 + 0.7 * i / count + rng.gauss(0, 0.03) for i in range(1, count + 1)]
    means = means[::-1] if falling else means
    spreads = [rng.uniform(0.04, 0.1) for _ in means]
    colour = COLOURS[names[0]]
    pairs = list(enumerate(zip(means, spreads, strict=True)))
    upper = [place(i + 1, min(0.99, m + 1.5 * s)) for i, (m, s) in pairs]
    lower = [place(i + 1, max(0.01, m - 1.5 * s)) for i, (m, s) in pairs]
    canvas.polygon(upper + lower[::-1], pale(colour, 5))
    canvas.line([place(i + 1, m) for i, m in enumerate(means)], colour, width=1.5)
    for i, (mean, spread) in pairs:
        _error_bar(canvas, place(i + 1, mean - spread), place(i + 1, mean + spread), colour)
        canvas.marker(place(i + 1, mean), colour, radius=2.8, shape="square")
    return (
        f"Mean {y_label} against {x_label} at {count} points with error bars, {names[0]} squares "
        f"{'falling' if falling else 'rising'} from {means[0]:.2f} to {means[-1]:.2f}, shaded band 95 %."
    )


def heat_map(canvas: Canvas, rng: random.Random, names: Sequence[str]) -> str:
    """A matrix of coloured cells with a colour bar."""
    columns, rows, colour = rng.randint(6, 10), rng.randint(5, 8), COLOURS[names[0]]
    x_hot, y_hot, width = rng.uniform(1, columns - 2), rng.uniform(1, rows - 2), rng.uniform(1.2, 2.5)
    box = _frame(canvas, right=48)
    _, top, right, bottom = box
    place = canvas.axes(box, (0, columns), (0, rows), x_label="column", y_label="row", grid=False, frame=True)

    def shade(value: float) -> Colour:
        return tuple(round(252 + (c * 0.75 - 252) * value) for c in colour)  # type: ignore[return-value]

    for i in range(columns):
        for j in range(rows):
            distance = ((i - x_hot) ** 2 + (j - y_hot) ** 2) / (2 * width**2)
            (x0, y0), (x1, y1) = place(i, j + 1), place(i + 1, j)
            value = min(1.0, max(0.0, 0.9 * math.exp(-distance) + rng.uniform(0, 0.12)))
            canvas.box((x0, y0, x1, y1), fill=shade(value), outline=None)
    canvas.box(box, width=0.9)
    for i in range(24):
        step = (bottom - top) / 24
        low, high = bottom - i * step, bottom - (i + 1) * step
        canvas.box((right + 9, high, right + 19, low), fill=shade(i / 23), outline=None)
    canvas.box((right + 9, top, right + 19, bottom), width=0.8)
    for value in (0.0, 0.5, 1.0):
        canvas.text((right + 22, bottom - value * (bottom - top)), f"{value:g}", size=8, anchor="lm")
    return (
        f"Heat map of {rows} rows and {columns} columns in {names[0]} shades from 0 to 1, "
        f"with the maximum near row {y_hot:.0f}, column {x_hot:.0f}."
    )


def small_multiples(canvas: Canvas, rng: random.Random, names: Sequence[str]) -> str:
    """Four or three lettered panels with the same axes."""
    wide, tall = canvas.width > 1.5 * canvas.height, canvas.height > canvas.width
    columns, rows = (3, 1) if wide else (1, 3) if tall else (2, 2)
    width, height = canvas.width / columns, canvas.height / rows
    for k in range(columns * rows):
        x, y = (k % columns) * width, (k // columns) * height
        box = (x + 30, y + 14, x + width - 8, y + height - 20)
        place = canvas.axes(box, (0, 6), (0, 1), size=8, frame=True, grid=False)
        canvas.text((x + 12, y + 9), f"({'abcd'[k]})", size=9)
        rate, phase, colour = rng.uniform(0.8, 2.5), rng.uniform(0, 3), COLOURS[names[k % 4]]
        curve = [place(i / 10, 0.5 + 0.4 * math.sin(rate * i / 10 + phase)) for i in range(61)]
        canvas.line(curve, colour, width=1.6)
    count = columns * rows
    return f"Small multiples: {count} panels of sine waves, {rows} by {columns}, in {', '.join(names[:count])}."


def log_plot(canvas: Canvas, rng: random.Random, names: Sequence[str]) -> str:
    """Power laws on logarithmic axes, with markers."""
    left, top, right, bottom = box = _frame(canvas)
    decades = 4

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / decades * (right - left), bottom - y / decades * (bottom - top)

    for i in range(decades + 1):
        canvas.line([place(i, 0), place(i, decades)], GRID, width=0.6)
        canvas.line([place(0, i), place(decades, i)], GRID, width=0.6)
        canvas.text((place(i, 0)[0], bottom + 5), f"1e{i}", size=8, anchor="mt")
        canvas.text((left - 5, place(0, i)[1]), f"1e{i - 3}", size=8, anchor="rm")
    canvas.box(box, width=0.9)
    slopes = rng.sample((0.25, 0.33, 0.5, 0.67, 0.8), 2)
    for k, (slope, name) in enumerate(zip(slopes, names, strict=False)):
        points = [(x / 4, 3.7 - 0.4 * k - slope * x / 4) for x in range(1, 16)]
        canvas.line([place(*p) for p in points], COLOURS[name], width=1.4)
        for p in points[::2]:
            canvas.marker(place(*p), COLOURS[name], radius=2.8, shape=("circle", "square")[k])
    canvas.text(((left + right) / 2, bottom + 23), "number of samples", size=9)
    canvas.text((left - 34, (top + bottom) / 2), "test loss", size=9, upright=True)
    canvas.legend((left + 5, bottom - 32), _key([f"slope -{slope}" for slope in slopes], names))
    return (
        f"Log-log plot of test loss against number of samples: power laws of slope -{slopes[0]} "
        f"({names[0]} circles) and -{slopes[1]} ({names[1]} squares)."
    )


Kind = Callable[[Canvas, random.Random, Sequence[str]], str]
KINDS: tuple[Kind, ...] = (
    line_plot, scatter_plot, bar_chart, flow_chart, heat_map, histogram,
    block_diagram, error_bars, box_plot, network, log_plot, small_multiples,
)  # fmt: skip
