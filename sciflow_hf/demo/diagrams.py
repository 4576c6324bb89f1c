"""Drawn diagrams: flow charts, block diagrams and networks of nodes, each with its caption."""

import random
from collections.abc import Sequence
from itertools import pairwise

from .canvas import COLOURS, INK, WHITE, Canvas, pale

STEPS = (
    ("collect samples", "extract DNA", "sequence", "align reads", "call variants", "report"),
    ("raw images", "denoise", "segment", "track cells", "measure", "statistics"),
    ("survey", "screening", "randomise", "treatment", "follow-up", "analysis"),
    ("load data", "normalise", "split", "train", "validate", "deploy"),
)
BLOCKS = (
    ("image", "encoder", "latent", "decoder", "output"),
    ("text", "embedding", "attention", "MLP", "softmax"),
    ("laser", "lens", "sample", "filter", "camera"),
    ("pump", "reactor", "column", "detector", "computer"),
)


def flow_chart(canvas: Canvas, rng: random.Random, names: Sequence[str]) -> str:
    """Steps in rounded boxes from top to bottom, or from left to right on wide pages."""
    steps = list(rng.choice(STEPS))[: rng.randint(4, 5) if canvas.height < 1.2 * canvas.width else 6]
    colour = COLOURS[names[0]]
    wide = canvas.width > 1.5 * canvas.height
    n = len(steps)
    for i, step in enumerate(steps):
        if wide:
            # Two rows, read like text: short words fit where one row of six boxes has no room.
            per_row = (n + 1) // 2
            row, column = divmod(i, per_row)
            cell = canvas.width / per_row
            x, y = cell * (column + 0.5), canvas.height * (0.28 + 0.44 * row)
            half_width, half_height = cell / 2 - 13, 19.0
        else:
            x, y = canvas.width / 2, canvas.height * (i + 0.5) / n
            half_width, half_height = min(75.0, canvas.width * 0.33), canvas.height / n * 0.29
        corners = (x - half_width, y - half_height, x + half_width, y + half_height)
        canvas.box(corners, fill=pale(colour, 4), outline=colour, width=1.4, radius=6)
        canvas.text((x, y), step, size=10)
        if i + 1 == n:
            break
        if not wide:
            canvas.arrow((x, y + half_height), (x, canvas.height * (i + 1.5) / n - half_height))
        elif (i + 1) % per_row:
            canvas.arrow((x + half_width, y), (x + half_width + 26, y))
        else:
            turn, first = canvas.height * 0.5, cell * 0.5
            canvas.line([(x, y + half_height), (x, turn), (first, turn)], width=1.2)
            canvas.arrow((first, turn), (first, canvas.height * 0.72 - half_height))
    return f"Flow chart with {n} {names[0]} boxes joined by arrows: {', '.join(steps)}."


def block_diagram(canvas: Canvas, rng: random.Random, names: Sequence[str]) -> str:
    """Boxes in a zigzag with arrows and one dashed feedback."""
    blocks, tall = rng.choice(BLOCKS), canvas.height > canvas.width
    n, first, second = len(blocks), COLOURS[names[0]], COLOURS[names[1]]
    centres = []
    for i in range(n):
        along, across = (i + 0.5) / n, 0.34 if i % 2 else 0.62
        x, y = (across, along) if tall else (along, across)
        centres.append((canvas.width * x, canvas.height * y))
    half_width, half_height = (36.0 if tall else 0.44 * canvas.width / n), 15.0
    for (x0, y0), (x1, y1) in pairwise(centres):
        if tall:
            canvas.line([(x0, y0), (x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2)], width=1.2)
            canvas.arrow((x1, (y0 + y1) / 2), (x1, y1 - half_height))
        else:
            canvas.line([(x0 + half_width, y0), (x1, y0)], width=1.2)
            canvas.arrow((x1, y0), (x1, y1 - half_height if y1 > y0 else y1 + half_height))
    for i, ((x, y), block) in enumerate(zip(centres, blocks, strict=True)):
        fill = second if i == n // 2 else first
        canvas.box((x - half_width, y - half_height, x + half_width, y + half_height), fill=fill, width=1.0, radius=3)
        canvas.text((x, y), block, size=10, colour=WHITE)
    (x0, y0), (x1, y1) = centres[-1], centres[0]
    side = canvas.width - 12.0 if tall else canvas.height - 14.0
    corners = (
        [(x0 + half_width, y0), (side, y0), (side, y1), (x1 + half_width, y1)]
        if tall
        else [(x0, y0 + half_height), (x0, side), (x1, side), (x1, y1 + half_height)]
    )
    for start, end in pairwise(corners[:-1]):
        canvas.dashed(start, end, width=1.1)
    canvas.arrow(corners[-2], corners[-1], width=1.1)
    return (
        f"Block diagram of {n} {names[0]} boxes joined by arrows, {', '.join(blocks)}, "
        f"with {blocks[n // 2]} in {names[1]} and dashed feedback."
    )


def network(canvas: Canvas, rng: random.Random, names: Sequence[str]) -> str:
    """Layers of a neural network, every node joined to the next layer."""
    layers = [rng.randint(3, 6) for _ in range(rng.randint(3, 4))]
    top, bottom = 20.0, canvas.height - 30.0
    nodes = []
    for i, count in enumerate(layers):
        x = canvas.width * (i + 0.5) / len(layers)
        gap = (bottom - top) / max(layers)
        nodes.append([(x, (top + bottom) / 2 + gap * (j - (count - 1) / 2)) for j in range(count)])
    for here, after in pairwise(nodes):
        for a in here:
            for b in after:
                canvas.line([a, b], (170, 170, 170), width=0.7)
    labels = ["input", *(f"hidden {i + 1}" for i in range(len(layers) - 2)), "output"]
    for i, (layer, label) in enumerate(zip(nodes, labels, strict=True)):
        for x, y in layer:
            canvas.marker((x, y), INK, radius=8.4)
            canvas.marker((x, y), COLOURS[names[i % 3]], radius=7.4)
        canvas.text((layer[0][0], canvas.height - 14), label, size=9.5)
    counts = ", ".join(map(str, layers))
    colours = f"{names[0]}, {names[1]} and {names[2]}"
    return f"Neural network diagram with {len(layers)} layers of {counts} nodes in {colours}."
