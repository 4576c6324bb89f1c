"""The bucket chart of `cache info`: a bar of samples per bucket, from tall to wide, as a PNG."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import SciflowError
from ..writing import output_file

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BARS = 120
_INK, _SOFT, _LINE, _BAR, _PAPER = "#1f2328", "#59636e", "#d1d9e0", "#1f77b4", "#ffffff"
_WIDTH, _MARGIN, _TOP, _ROW, _ICON = 960, 28, 84, 26, 18


def write_bucket_chart(buckets: Mapping[tuple[int, int], int], file: str | Path) -> Path:
    """Draws the chart into `file`, a PNG that appears complete or not at all.

    Args:
        buckets: samples of each (height, width) in pixels.

    Raises:
        SciflowError: no bucket, or a file that cannot be written.
    """
    image = draw_bucket_chart(buckets)
    file = Path(file)
    with output_file(file) as handle:
        image.save(handle, format="PNG")
    return file


def draw_bucket_chart(buckets: Mapping[tuple[int, int], int]) -> "Image":
    """The chart as an RGB image: one line a bucket with its proportions, size, bar and number of samples.

    Buckets beyond the `MAX_BARS` largest share the last line.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not buckets:
        raise SciflowError("`buckets` is empty: there is nothing to draw.")
    largest = sorted(buckets, key=lambda size: -buckets[size])[:MAX_BARS]
    shown = sorted(largest, key=lambda size: (size[1] / size[0], size))
    total, rest = sum(buckets.values()), sum(buckets.values()) - sum(buckets[size] for size in shown)
    lines = [(size, f"{size[0]} x {size[1]}", buckets[size]) for size in shown]
    if rest:
        lines.append(((0, 0), f"{len(buckets) - len(shown)} others", rest))

    title, text = ImageFont.load_default(22), ImageFont.load_default(14)
    numbers = [f"{count:,}  ({count / total:.1%})" for _, _, count in lines]
    left = _MARGIN + _ICON + 12 + max(text.getlength(label) for _, label, _ in lines) + 12
    right = _WIDTH - _MARGIN - max(text.getlength(number) for number in numbers) - 8
    scale = (right - left) / max(count for _, _, count in lines)
    image = Image.new("RGB", (_WIDTH, _TOP + _ROW * len(lines) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(image)
    plural = "s" * (len(buckets) > 1)
    draw.text((_MARGIN, 22), f"{total:,} samples in {len(buckets)} bucket{plural}", font=title, fill=_INK)
    draw.text((_MARGIN, 52), "height x width in pixels, from tall to wide", font=text, fill=_SOFT)
    draw.line((left, _TOP, left, _TOP + _ROW * len(lines)), fill=_LINE)
    for i, ((size, label, count), number) in enumerate(zip(lines, numbers, strict=True)):
        middle = _TOP + _ROW * (i + 0.5)
        if max(size):  # the proportions of the images
            half = [_ICON / 2 * side / max(size) for side in size]  # height, width
            centre = _MARGIN + _ICON / 2
            box = (centre - half[1], middle - half[0], centre + half[1], middle + half[0])
            draw.rectangle(box, outline=_SOFT)
        draw.text((left - 12, middle), label, font=text, fill=_INK, anchor="rm")
        end = left + max(1, scale * count)
        draw.rectangle((left, middle - 8, end, middle + 8), fill=_BAR)
        draw.text((end + 8, middle), number, font=text, fill=_SOFT, anchor="lm")
    return image
