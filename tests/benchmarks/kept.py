"""What `cache build` keeps of images of many sizes: buckets, the area shown, pixels, and images that are enlarged.

    python -m tests.benchmarks.kept

The sizes are drawn by a fixed seed; nothing is encoded. Then what each rule cuts off, or pads, of 200 figures of 1:4 to
4:1 that are as large as the resolution or larger.
"""

import math
import sys
from typing import Any

import numpy as np

from sciflow_hf.data.batches.sizes import FITS, fitting_bucket, ladder
from sciflow_hf.data.build.views import view_of
from sciflow_hf.data.inspect.describe import text_table

IMAGES, RESOLUTION, STEP = 2000, 1024, 16
AREAS = {"like the resolution": (1.0, 4.0), "small": (0.01, 0.5), "mixed": (0.01, 16.0)}  # in resolution**2
ASPECTS = {"up to 2:1": 2.0, "wide, 2:1 to 6:1": 6.0}
RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "--max_aspect_ratio 4": {"max_aspect_ratio": 4},
    "--buckets equal_tokens": {"buckets": "equal_tokens"},
    "--buckets equal_tokens --max_aspect_ratio 4": {"buckets": "equal_tokens", "max_aspect_ratio": 4},
}
FIGURES = 200


def main() -> None:
    rungs = ladder(RESOLUTION, STEP)
    table = [("areas", "shapes", "rule", "buckets", "area shown", "pixels", "enlarged")]
    for areas, (low, high) in AREAS.items():
        for aspects, widest in ASPECTS.items():
            rng = np.random.default_rng(0)
            area = np.exp(rng.uniform(np.log(low), np.log(high), IMAGES)) * RESOLUTION**2
            aspect = np.exp(rng.uniform(-np.log(2) if widest == 2 else np.log(2), np.log(widest), IMAGES))
            heights, widths = (np.sqrt(area / aspect).round(), np.sqrt(area * aspect).round())
            sizes = [(int(height), int(width)) for height, width in zip(heights, widths, strict=True)]
            for rule, steps in (("default", rungs), ("--enlarge", rungs[:1])):
                views = [view_of("", "", size, fitting_bucket(*size, steps)) for size in sizes]
                shown = np.mean([1 - view.cut_off for view in views])
                pixels = [np.prod(view.size) / min(np.prod(view.original), RESOLUTION**2) for view in views]
                larger = [view.enlarged for view in views if view.enlarged > 1 + 1e-6]
                share = f"{len(larger) / IMAGES:.0%}" + (f", at most {max(larger):.2f} times" if larger else "")
                kinds = len({view.size for view in views})
                table.append((areas, aspects, rule, f"{kinds}", f"{shown:.0%}", f"{np.mean(pixels):.0%}", share))
    sys.stdout.write(
        text_table(table, right=range(3, 6)) + "\n\n" + text_table(long_figures(), right=range(1, 7)) + "\n"
    )


def long_figures() -> list[tuple[str, ...]]:
    """A row for each rule."""
    rng = np.random.default_rng(0)
    area = np.exp(rng.uniform(0, np.log(4), FIGURES)) * RESOLUTION**2
    aspect = np.exp(rng.uniform(-np.log(4), np.log(4), FIGURES))
    sizes = [(round(math.sqrt(a / ratio)), round(math.sqrt(a * ratio))) for a, ratio in zip(area, aspect, strict=True)]
    table = [("rule", "buckets", "token counts", "cut off: mean", "most", "over 10 %", "padding: mean", "most")]
    for rule, options in RULES.items():
        for fit in FITS:
            rungs = ladder(RESOLUTION, STEP, **options)
            views = [view_of("", "", size, fitting_bucket(*size, rungs, fit), fit) for size in sizes]
            cut, padded = (np.array([getattr(view, name) for view in views]) for name in ("cut_off", "padded"))
            kinds = {view.size for view in views}
            tokens = {height * width // STEP**2 for height, width in kinds}
            shares = (cut.mean(), cut.max(), (cut > 0.1).mean(), padded.mean(), padded.max())
            name = rule if fit == FITS[0] else f"{rule.removeprefix('default')} --fit {fit}".strip()
            table.append((name, f"{len(kinds)}", f"{len(tokens)}", *(f"{share:.1%}" for share in shares)))
    return table


if __name__ == "__main__":
    main()
