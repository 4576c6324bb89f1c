"""The pixels of views, and their masks, read from the files of their images."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ...errors import first_line
from .jobs import Job
from .sources.pixels import NOT_NUMBERS, to_rgb, unreadable
from .views import fit_mask, fit_pixels


@dataclass
class Pixels:
    """A view as the encoder takes it.

    Attributes:
        job: whose view it is.
        reason: why it cannot be used; "" if it can.
        pixels: (3, H, W), float32 in [-1, 1].
        mask: its loss mask: grey, as large as the bucket.
        not_numbers: whether pixels of the image were NaN or infinite.
    """

    job: Job
    reason: str = ""
    pixels: np.ndarray = field(default_factory=lambda: np.empty(0))
    mask: Image.Image = field(default_factory=lambda: Image.new("L", (1, 1)))
    not_numbers: bool = False


def read_views(jobs: Sequence[Job]) -> list[Pixels]:
    """Views of one image, which is decoded once."""
    try:
        with jobs[0].record.image.open() as file:
            image = to_rgb(file)
    except Exception as error:  # PIL lets through whatever its decoders raise; the image is named
        return [Pixels(job, unreadable(error)) for job in jobs]
    return [_view(job, image) for job in jobs]


def _view(job: Job, image: Image.Image) -> Pixels:
    try:
        pixels = fit_pixels(image, job.view)
    except Exception as error:
        return Pixels(job, unreadable(error))
    try:
        return Pixels(job, "", pixels, fit_mask(_mask(job), job.view), NOT_NUMBERS in image.info)
    except Exception as error:
        return Pixels(job, f"unusable loss mask ({first_line(error)})")


def _mask(job: Job) -> Image.Image | None:
    if job.record.mask is None:
        return None
    with job.record.mask.open() as file:
        return to_rgb(file)
