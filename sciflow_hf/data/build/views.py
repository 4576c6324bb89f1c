"""Views of an image that go into buckets: the complete image, crops at fixed places, and their mirror images."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ...diffusion.randomness import hash64

_VARIANT = re.compile(r"(?:caption[1-9]\d*)?(?:(?:^|(?<=\d)-)crop([1-9]\d*))?(?:(?:^|(?<=\d)-)flip)?")
_Size = tuple[int, int]
_SHADES = 16  # levels of a channel that count as one kind of colour
_CHANGED = 24 / 127.5  # of a channel in [-1, 1]: 24 of 255 levels
MIRRORED = "mirrored text cannot be read, and captions that say left or right become wrong."


@dataclass(frozen=True)
class View:
    """A window of an image.

    Attributes:
        variant: "", "crop1", "flip", "crop1-flip", ..., and the same after "caption2", ... of an image with captions.
        original: (height, width) of the image.
        size: (height, width) of the bucket that the window is brought to.
        box: the window as (left, top, right, bottom) in pixels of the image; beyond the image it is padded.
        crop: (top, left) of the window in pixels of the image once it is resized (and mirrored), as in SDXL.
    """

    variant: str
    original: _Size
    size: _Size
    box: tuple[float, float, float, float]
    crop: _Size

    @property
    def flipped(self) -> bool:
        return self.variant.endswith("flip")

    @property
    def enlarged(self) -> float:
        """How many times larger a side becomes."""
        left, top, right, bottom = self.box
        return max(self.size[0] / (bottom - top), self.size[1] / (right - left))

    @property
    def cut_off(self) -> float:
        """Share of the image's area that is not shown."""
        left, top, right, bottom = self.inside
        return 1 - (bottom - top) * (right - left) / (self.original[0] * self.original[1])

    @property
    def inside(self) -> tuple[float, float, float, float]:
        """The part of `box` that lies in the image."""
        (left, top, right, bottom), (height, width) = self.box, self.original
        return max(left, 0), max(top, 0), min(right, width), min(bottom, height)

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Where the image is in the bucket, as (left, top, right, bottom) in its pixels; the rest is padding."""
        (left, top, right, bottom), shown = self.box, self.inside
        y, x = self.size[0] / (bottom - top), self.size[1] / (right - left)
        start_x, start_y = round((shown[0] - left) * x), round((shown[1] - top) * y)
        end_x, end_y = round((shown[2] - left) * x), round((shown[3] - top) * y)
        return start_x, start_y, max(end_x, start_x + 1), max(end_y, start_y + 1)

    @property
    def padded(self) -> float:
        """Share of the bucket that is padding."""
        left, top, right, bottom = self.place
        return 1 - (bottom - top) * (right - left) / (self.size[0] * self.size[1])


def variants(crops: int, flip: bool, part: str = "") -> list[str]:
    """Names of the views of each image: first the complete image, then `crops` windows, then all of them mirrored.

    Args:
        crops: windows.
        flip: whether there are mirror images.
        part: that the names begin with: which caption of the image it is.
    """
    plain = [part, *(f"{part}-crop{number}".removeprefix("-") for number in range(1, crops + 1))]
    return plain + [f"{name}-flip".removeprefix("-") for name in plain if flip]


def view_of(variant: str, image_id: str, original: _Size, size: _Size, fit: str = "cut") -> View:
    """The view called `variant` of the image `image_id`: always the same.

    The complete image covers the bucket and loses the excess on two sides, or with `fit` "pad" fits into it, in the
    middle. A crop is a window in the image's own pixels (enlarged only if it is too small) at a place that follows from
    `image_id` and its number.
    """
    found = _VARIANT.fullmatch(variant)
    if found is None:
        raise ValueError(f"no variant of an image is called {variant!r}")
    scale = _covering(original, size)
    if number := found[1]:
        return _window(variant, original, size, max(1.0, scale), image_id, int(number))
    (height, width), (full_h, full_w) = size, original
    if fit == "pad":
        within = min(height / full_h, width / full_w)
        h, w = (min(side, max(1, round(own * within))) for side, own in zip(size, original, strict=True))
        above, before, y, x = (height - h) // 2, (width - w) // 2, full_h / h, full_w / w
        padded = (-before * x, -above * y, (width - before) * x, (height - above) * y)
        return View(variant, original, size, padded, (0, 0))
    crop_h, crop_w = min(height / scale, full_h), min(width / scale, full_w)
    resized = round(full_h * scale), round(full_w * scale)
    top, left = (full_h - crop_h) / 2, (full_w - crop_w) / 2
    box = (left, top, left + crop_w, top + crop_h)
    return _view(variant, original, size, box, resized, (round(top * scale), round(left * scale)))


def random_view(
    variant: str, image_id: str, key: int, original: _Size, size: _Size, crop: str, flip: bool, fit: str = "cut"
) -> View:
    """The view of an image in one step of training; it follows from the sample's `noise_key`.

    Args:
        crop: the view called `variant` (""), or a window at a random place of the image: resized until it covers the
            bucket ("resized"), or in its own pixels unless that is too small ("original").
        flip: mirror half of the views.
        fit: of `view_of`.
    """
    if flip and hash64(key, "flip") >> 63:
        mirrored = variant.endswith("flip")
        variant = variant.removesuffix("flip").removesuffix("-") if mirrored else f"{variant}-flip".removeprefix("-")
    if not crop:
        return view_of(variant, image_id, original, size, fit)
    scale = _covering(original, size)
    return _window(variant, original, size, scale if crop == "resized" else max(1.0, scale), key)


def _covering(original: _Size, size: _Size) -> float:
    """The scale at which an image just covers its bucket."""
    return max(size[0] / original[0], size[1] / original[1])


def _window(variant: str, original: _Size, size: _Size, scale: float, *key: int | str) -> View:
    """A window of the image at this scale, at a place that follows from `key`."""
    (height, width), (full_h, full_w) = size, original
    resized = max(height, round(full_h * scale)), max(width, round(full_w * scale))  # rounded as a resized image is
    top = hash64(*key, "crop top") % (resized[0] - height + 1)
    left = hash64(*key, "crop left") % (resized[1] - width + 1)
    y, x = full_h / resized[0], full_w / resized[1]
    box = (left * x, top * y, min((left + width) * x, full_w), min((top + height) * y, full_h))
    return _view(variant, original, size, box, resized, (top, left))


def _view(
    variant: str, original: _Size, size: _Size, box: tuple[float, float, float, float], resized: _Size, crop: _Size
) -> View:
    top, left = crop
    if variant.endswith("flip"):
        left = resized[1] - size[1] - left
    return View(variant, original, size, box, (top, max(left, 0)))


def fit_pixels(image: Image.Image, view: View) -> np.ndarray:
    """The view of an RGB image: (3, H, W), float32 in [-1, 1]."""
    levels = np.asarray(fit_image(image, view)).transpose(
        2, 0, 1
    )  # stays channels-last in memory, by which convolutions round
    pixels = (np.ascontiguousarray(levels[:, :, ::-1]) if view.flipped else levels) / np.float32(127.5)
    pixels -= 1
    return pixels


def fit_image(image: Image.Image, view: View) -> Image.Image:
    """The view of an RGB image before it is mirrored, as large as the bucket."""
    return _fitted(image, view, view.inside, Image.Resampling.LANCZOS, page_colour)


def _fitted(
    image: Image.Image,
    view: View,
    box: tuple[float, float, float, float],
    resampling: Image.Resampling,
    colour: Callable[[Image.Image], Any],
) -> Image.Image:
    """The part `box` of an image where the view shows it, around it the `colour` of the image."""
    left, top, right, bottom = view.place
    shown = image.resize((right - left, bottom - top), resampling, box=box)
    if shown.size == view.size[::-1]:
        return shown
    page = Image.new(image.mode, view.size[::-1], colour(image))
    page.paste(shown, (left, top))
    return page


def page_colour(image: Image.Image) -> tuple[int, ...]:
    """The colour of the page around an RGB image: the median of the colours near the commonest one along its edges."""
    levels = np.asarray(image)
    edge = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    kinds, kind = np.unique(edge // _SHADES, axis=0, return_inverse=True)
    commonest = np.bincount(kind.ravel(), minlength=len(kinds)).argmax()
    about = np.median(edge[kind.ravel() == commonest], axis=0)
    near = (np.abs(edge - about) <= _SHADES).all(1)  # noise may fall into two kinds
    return tuple(int(level) for level in np.median(edge[near], axis=0))


def own_pixels(image: Image.Image, view: View) -> Image.Image:
    """The view of an RGB image before it is mirrored, in the image's own pixels."""
    left, top, right, bottom = (round(edge) for edge in view.box)
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    if left >= 0 and top >= 0 and right <= image.width and bottom <= image.height:
        return image.crop((left, top, right, bottom))
    page = Image.new("RGB", (right - left, bottom - top), page_colour(image))
    page.paste(image, (-left, -top))
    return page


def fit_mask(mask: Image.Image | None, view: View) -> Image.Image:
    """The view of a loss mask: grey, as large as the bucket, and 0 in the padding.

    Args:
        mask: of the shape of the image, at any resolution; None: everything counts (255).

    Raises:
        ValueError: the mask has another shape.
    """
    if mask is None:
        page = Image.new("L", view.size[::-1], 0)
        page.paste(255, view.place)
        return ImageOps.mirror(page) if view.flipped else page
    (height, width), scale = view.original, mask.height / view.original[0]
    if abs(mask.width - width * scale) > max(1.0, scale):
        raise ValueError(f"it is {mask.height} x {mask.width}, its image {height} x {width}")
    y, x = mask.height / height, mask.width / width
    left, top, right, bottom = view.inside
    box = (left * x, top * y, min(right * x, mask.width), min(bottom * y, mask.height))
    fitted = _fitted(mask.convert("L"), view, box, Image.Resampling.BOX, lambda mask: 0)
    return ImageOps.mirror(fitted) if view.flipped else fitted


def average_mask(fitted: Image.Image, size: _Size) -> np.ndarray:
    """The mean of a fitted mask over the pixels of each latent: `size` (h, w), uint8."""
    return np.array(fitted.resize(size[::-1], Image.Resampling.BOX))


def largest_mask(fitted: Image.Image, size: _Size) -> np.ndarray:
    """The largest value of a fitted mask among the pixels of each latent: `size` (h, w), uint8."""
    (height, width), (h, w) = (fitted.height, fitted.width), size
    return np.asarray(fitted).reshape(h, height // h, w, width // w).max((1, 3))


def box_mask(boxes: Sequence[tuple[float, float, float, float]], size: _Size) -> Image.Image:
    """A mask of an image of `size` (height, width): white inside the boxes (left, top, right, bottom)."""
    mask = np.zeros(size, np.uint8)
    for left, top, right, bottom in boxes:
        mask[int(top) : math.ceil(bottom), int(left) : math.ceil(right)] = 255
    return Image.fromarray(mask)


def changed_mask(one: np.ndarray, other: np.ndarray) -> Image.Image:
    """White where two views (3, H, W) in [-1, 1] differ by more than what compression and resizing leave."""
    return Image.fromarray(np.where(np.abs(one - other).max(0) > _CHANGED, np.uint8(255), np.uint8(0)))
