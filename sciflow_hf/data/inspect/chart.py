"""The bucket chart of `cache info`: a bar of samples per bucket, from tall to wide, as a PNG."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import SciflowError
from ..writing import output_file

MAX_BARS = 120


def write_bucket_chart(buckets: Mapping[tuple[int, int], int], file: str | Path) -> Path:
    """Draws the chart into `file`, a PNG that appears complete or not at all.

    Args:
        buckets: samples of each (height, width) in pixels.

    Raises:
        SciflowError: no bucket, or a file that cannot be written.
    """
    image = draw_bucket_chart(buckets)
    with output_file(Path(file)) as handle:
        image.save(handle, format="PNG")
    return Path(file)


def draw_bucket_chart(buckets: Mapping[tuple[int, int], int]) -> Image.Image:
    """Draws how many samples each bucket has: one line a bucket with its size, bar and number.

    Args:
        buckets: (height, width) in pixels -> number of samples. Those beyond the `MAX_BARS` largest share a line.

    Returns:
        An RGB image.

    Raises:
        SciflowError: there are no buckets.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not buckets:
        raise SciflowError("`buckets` is empty: there is nothing to draw.")
    largest = sorted(buckets, key=lambda size: -buckets[size])[:MAX_BARS]
    shown = sorted(largest, key=lambda size: (size[1] / size[0], size))
    lines = {f"{height} x {width}": buckets[height, width] for height, width in shown}
    total = sum(buckets.values())
    if rest := total - sum(lines.values()):
        lines[f"{len(buckets) - len(shown)} others"] = rest
    figure = Figure((9.6, 1.0 + 0.26 * len(lines)), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    bars = axes.barh(list(lines), list(lines.values()), height=0.6)
    axes.bar_label(bars, [f"{count:,}  ({count / total:.1%})" for count in lines.values()], padding=6)
    plural = "s" * (len(buckets) > 1)
    axes.set_title(f"{total:,} samples in {len(buckets)} bucket{plural}\nheight x width in pixels", loc="left")
    axes.set(xticks=[], xlim=(0, 1.2 * max(lines.values())), ylim=(len(lines) - 0.5, -0.5))
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
