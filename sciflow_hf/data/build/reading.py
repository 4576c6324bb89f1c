"""The pixels of views, and their masks, read from the files of their images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageChops

from ...errors import first_line
from .jobs import Job
from .references import SourceView
from .sources.pixels import NOT_NUMBERS, to_rgb, unreadable
from .sources.record import Stored
from .views import box_mask, changed_mask, fit_mask, fit_pixels


@dataclass
class Pixels:
    """A view as the encoder takes it.

    Attributes:
        job: whose view it is.
        reason: why it cannot be used; "" if it can.
        pixels: (3, H, W), float32 in [-1, 1].
        mask: its loss mask: grey, as large as the bucket.
        edit_mask: its changed region, of the same kind: white inside.
        not_numbers: whether pixels of the image were NaN or infinite.
    """

    job: Job
    reason: str = ""
    pixels: np.ndarray = field(default_factory=lambda: np.empty(0))
    mask: Image.Image = field(default_factory=lambda: Image.new("L", (1, 1)))
    edit_mask: Image.Image = field(default_factory=lambda: Image.new("L", (1, 1)))
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
    except Exception as error:  # PIL decodes here; the image is named
        return Pixels(job, unreadable(error))
    try:
        mask = fit_mask(_opened(job.record.mask), job.view)
    except Exception as error:  # as above; the mask is named
        return Pixels(job, f"unusable loss mask ({first_line(error)})")
    try:
        edit_mask = _edit_mask(job, pixels)
    except Exception as error:  # as above; the mask is named
        return Pixels(job, f"unusable mask of the changed region ({first_line(error)})")
    return Pixels(job, "", pixels, mask, edit_mask, NOT_NUMBERS in image.info)


def _edit_mask(job: Job, pixels: np.ndarray) -> Image.Image:
    """The changed region of a view; all of it where that is not known."""
    mask = job.record.edit_mask if job.sources else None
    if job.computes_mask:
        changed = changed_mask(pixels, fit_pixels(job.sources[0].read(), job.view))
        return ImageChops.darker(changed, fit_mask(None, job.view))  # the page of each may have another colour
    return fit_mask(box_mask(mask, job.view.original) if isinstance(mask, tuple) else _opened(mask), job.view)


def _opened(mask: Stored | None) -> Image.Image | None:
    if mask is None:
        return None
    with mask.open() as file:
        return to_rgb(file)


def read_source(source: SourceView, odd: Callable[[str], None] = lambda name: None) -> np.ndarray | str:
    """The pixels of a source, (3, H, W), float32 in [-1, 1]; a text says why it cannot be used.

    `odd` is called with the name of a source with pixels that are NaN or infinite.
    """
    try:
        image = source.read()
        if NOT_NUMBERS in image.info:
            odd(source.name)
        return fit_pixels(image, source.view)
    except Exception as error:  # PIL lets through whatever its decoders raise
        return unreadable(error)
