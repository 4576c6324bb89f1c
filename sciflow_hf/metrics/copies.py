"""Near copies of training figures: the nearest ones by a perceptual hash, and how alike the pixels are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

COPY = 0.95
"""Similarity from which an image is called a copy."""
_HASHED, _SIDE, _NEAREST = 32, 64, 8
_COSINES = np.cos(np.pi * np.arange(9)[:, None] * (2 * np.arange(_HASHED) + 1) / (2 * _HASHED))


@dataclass(frozen=True)
class Copy:
    """The training figure that an image is most like.

    Attributes:
        name: of the figure.
        similarity: correlation of the pixels, at most 1.
    """

    name: str
    similarity: float


@dataclass(frozen=True)
class Figures:
    """Training figures by their hashes; pixels are read again where they are compared.

    Attributes:
        names: of the N figures.
        pictures: each reads one, in RGB.
        hashes: (N,), uint64.
    """

    names: Sequence[str]
    pictures: Sequence[Callable[[], Image.Image]]
    hashes: np.ndarray


def perceptual_hash(image: Image.Image) -> np.uint64:
    """64 bits: which of the lowest frequencies of the 32 x 32 grey image lie above their median (pHash)."""
    grey = np.asarray(image.convert("L").resize((_HASHED, _HASHED), Image.Resampling.LANCZOS), np.float64)
    low = (_COSINES @ grey @ _COSINES.T).ravel()[1:65]
    return np.packbits(low > np.median(low)).view(np.uint64)[0]


def similarity(image: Image.Image, other: Image.Image) -> float:
    """Correlation of two images at 64 x 64 pixels, -1 to 1; 0 with an image of one colour."""
    one, two = (_small(picture) for picture in (image, other))
    return float(one @ two)


def nearest_copy(image: Image.Image, figures: Figures) -> Copy:
    """The most similar one of the eight training figures with the nearest hashes."""
    distances = np.bitwise_count(figures.hashes ^ perceptual_hash(image))
    near = [int(index) for index in np.argsort(distances, kind="stable")[:_NEAREST]]
    alike = [similarity(image, figures.pictures[index]()) for index in near]
    best = int(np.argmax(alike))
    return Copy(figures.names[near[best]], alike[best])


def _small(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), np.float64).ravel()
    pixels -= pixels.mean()
    length = np.linalg.norm(pixels)
    return pixels / length if length else pixels
