"""Guards: rewards that are 1 for any proper image, against what other rewards do not see."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

_DIFFERS = 24  # levels of 255
_LEAST = 0.001  # share of the pixels


def aspect(
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    width: Sequence[Any] | None = None,
    height: Sequence[Any] | None = None,
) -> list[float | None]:
    """How well each image keeps the width : height that was asked for: the smaller ratio of the two over the larger.

    Args:
        prompts: not read.
        images: in RGB.
        width: asked for; None where nothing was.
        height: as `width`.
    """

    def score(image: Image.Image, wide: Any, high: Any) -> float | None:
        if not wide or not high:
            return None
        found = (image.width / image.height) / (float(wide) / float(high))
        return min(found, 1 / found)

    none = [None] * len(images)
    return [score(*row) for row in zip(images, width or none, height or none, strict=True)]


def blank(prompts: Sequence[str], images: Sequence[Image.Image]) -> list[float | None]:
    """0 for a page of one colour, else 1: on it, no pixel in a thousand differs by 24 of 255 from the median colour."""

    def score(image: Image.Image) -> float:
        pixels = np.asarray(image.convert("RGB"), dtype=np.int16)
        differs = np.abs(pixels - np.median(pixels, axis=(0, 1))).max(-1) >= _DIFFERS
        return float(differs.mean() >= _LEAST)

    return [score(image) for image in images]
