"""Rewards for edits: how near the image is to the target, and how it is where the target differs from the source."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..restoration import psnr as psnr_of
from ..restoration import ssim as ssim_of
from .pictures import opened

DIFFERS = 24
"""Levels of 255 by which a channel of the target differs from the source in the changed region."""
BEST = 100.0
"""PSNR of equal images, dB."""
Column = Sequence[Any] | None


def psnr(prompts: Sequence[str], images: Sequence[Image.Image], reference: Column = None) -> list[float | None]:
    """Peak signal-to-noise ratio to the target, dB, at most 100; None for a row without one.

    Args:
        prompts: not read.
        images: in RGB; brought to the size of the target where it is another one.
        reference: of each the target, see `opened`.
    """
    return _scored(images, reference, None, lambda image, target, _: _psnr(image, target))


def ssim(prompts: Sequence[str], images: Sequence[Image.Image], reference: Column = None) -> list[float | None]:
    """Structural similarity to the target, see `restoration.ssim`; arguments as `psnr`.

    Raises:
        SciflowError: scikit-image is not installed.
    """

    def score(image: np.ndarray, target: np.ndarray, _: Any) -> float:
        return ssim_of(image.transpose(2, 0, 1), target.transpose(2, 0, 1), data_range=255)

    return _scored(images, reference, None, score)


def changed_psnr(
    prompts: Sequence[str], images: Sequence[Image.Image], reference: Column = None, sources: Column = None
) -> list[float | None]:
    """PSNR to the target in the changed region, where the target differs from the first source.

    Args:
        prompts: not read.
        images: in RGB.
        reference: of each the target, see `opened`.
        sources: of each a list of what it was made from; None, or an empty list, for what is no edit.
    """
    return _scored(images, reference, sources, lambda *given: _within(*given, changed=True))


def kept_psnr(
    prompts: Sequence[str], images: Sequence[Image.Image], reference: Column = None, sources: Column = None
) -> list[float | None]:
    """PSNR to the target outside the changed region: whether the rest was left alone. Arguments as `changed_psnr`."""
    return _scored(images, reference, sources, lambda *given: _within(*given, changed=False))


def changed_region(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Where an edit changes something: (H, W, 3) twice -> (H, W), bool."""
    found: np.ndarray = np.abs(source.astype(np.int16) - target).max(-1) >= DIFFERS
    return found


def _scored(
    images: Sequence[Image.Image],
    reference: Column,
    sources: Column,
    score: Callable[[np.ndarray, np.ndarray, np.ndarray | None], float | None],
) -> list[float | None]:
    none = [None] * len(images)
    rows = zip(images, reference or none, sources or none, strict=True)
    return [None if target is None else score(*_alike(image, target, given)) for image, target, given in rows]


def _alike(image: Image.Image, target: Any, sources: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Image, target and first source, (H, W, 3), in the size of the target."""
    target = opened(target)

    def pixels(picture: Image.Image) -> np.ndarray:
        return np.asarray(picture.convert("RGB").resize(target.size, Image.Resampling.LANCZOS))

    first = None if sources is None or len(sources) == 0 else pixels(opened(sources[0]))
    return pixels(image), np.asarray(target), first


def _within(image: np.ndarray, target: np.ndarray, source: np.ndarray | None, *, changed: bool) -> float | None:
    if source is None:
        return None
    where = changed_region(source, target) == changed
    return _psnr(image[where], target[where]) if where.any() else None


def _psnr(image: np.ndarray, target: np.ndarray) -> float:
    return min(BEST, psnr_of(image, target, data_range=255))
