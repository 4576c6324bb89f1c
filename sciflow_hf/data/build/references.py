"""Reference images ("sources") of rows: how a family takes them, and which part of each is shown."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps

from .sources.pixels import to_rgb
from .sources.record import Box, Record
from .views import View, own_pixels

_Size = tuple[int, int]


@dataclass(frozen=True)
class SourceRules:
    """How a family takes sources.

    Attributes:
        most: how many a row may have.
        size: (height, width) in pixels at which the pipeline shows a source of this (height, width).
        resized: (height, width) to which it resizes the source before it cuts `size` out of the centre.
        check: why it refuses a source of this (height, width); "" if it takes it.
        encode: (B, 3, H, W) float32 in [-1, 1] -> latents (B, C, h, w), the mode of the posterior.
        text: whether the text encoder also reads the sources. `encode_prompts` is then called with
            `sources`, for each prompt a list of RGB images.
    """

    most: int
    size: Callable[[int, int], _Size]
    resized: Callable[[int, int], _Size]
    check: Callable[[int, int], str]
    encode: Callable[[torch.Tensor], torch.Tensor]
    text: bool = False


@dataclass(frozen=True)
class SourceView:
    """The part of a source that is shown.

    Attributes:
        record: the image whose source it is.
        number: which of its sources, from 0.
        view: the window, and the size that it is brought to.
        id: 16 hex digits: equal where the source's bytes and the view are.
    """

    record: Record
    number: int
    view: View
    id: str

    @property
    def name(self) -> str:
        return self.record.source_names[self.number]

    def read(self) -> Image.Image:
        """All of the source, RGB."""
        with self.record.sources[self.number].open() as file:
            return to_rgb(file)

    def window(self) -> Image.Image:
        """The window in the source's own pixels, as a text encoder is shown it."""
        shown = own_pixels(self.read(), self.view)
        return ImageOps.mirror(shown) if self.view.flipped else shown


def source_view(
    record: Record, number: int, content: str, original: _Size, target: View, rules: SourceRules
) -> SourceView:
    """The view of a source next to the view `target` of its image.

    A source of the image's size is shown through the target's window. Of any other all is shown, as the pipeline
    does; it is mirrored where the target is.

    Args:
        content: what stands for the source's bytes.
        original: (height, width) of the source.
    """
    follows = original == target.original
    shown = target.size if follows else original
    box: Box = target.box if follows else (0, 0, original[1], original[0])
    size, (height, width) = rules.size(*shown), rules.resized(*shown)
    if size != (height, width):
        y, x = (box[3] - box[1]) / height, (box[2] - box[0]) / width
        left, top = box[0] + (width - size[1]) // 2 * x, box[1] + (height - size[0]) // 2 * y
        box = (left, top, min(left + size[1] * x, box[2]), min(top + size[0] * y, box[3]))
    view = View("flip" if target.flipped else "", original, size, box, (0, 0))
    text = json.dumps(["source", content, box, size, view.flipped])
    return SourceView(record, number, view, hashlib.sha256(text.encode()).hexdigest()[:16])
