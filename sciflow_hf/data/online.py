"""Images that are encoded in training, instead of stored latents: where they lie, and what is shown of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import CacheError, first_line
from . import storage
from .build.sources.pixels import to_rgb, unreadable
from .build.sources.record import Record, Stored
from .build.views import average_mask, fit_mask, fit_pixels, random_view, view_of

IMAGE_KEYS = ("latents", "latents_std", "loss_mask", "time_ids")
"""Stored by a cache for an image."""
_Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class OnlineImages:
    """Reads the images of a cache's rows, and encodes batches of them.

    A row's image is shown as its cache would store it, or, in training, by the sample's `noise_key`: as a window at a
    random place, mirrored or not. That follows from the key alone, so resuming and other numbers of ranks change
    nothing.

    Args:
        encode: images (B, 3, H, W), float32 in [-1, 1] -> `latents` (B, C, h, w) and perhaps `latents_std`.
        places: for each entry of `dataset_dir` its images: records by name, or the folder or URL in which `image_path`
            lies; None: the folder of the cache.
        batch_size: encoded at once. With 1 the latents of an image do not depend on what shares its batch.
        time_ids: batches have `time_ids` (B, 6), see `build_cache`.
        crop: "", "resized" or "original", see `random_view`.
        flip: mirror half of the images.
        fit: "cut" or "pad", as the cache was built.
    """

    encode: Callable[[torch.Tensor], _Tensors]
    places: Sequence[Mapping[str, Record] | str | None] = (None,)
    batch_size: int = 1
    time_ids: bool = False
    crop: str = ""
    flip: bool = False
    fit: str = "cut"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"encode": None}  # which stays in the main process

    def __str__(self) -> str:
        crops = {
            "": "padded" if self.fit == "pad" else "centre crops",
            "resized": "random crops",
            "original": "random crops of their own pixels",
        }
        return crops[self.crop] + ", half of them mirrored" * self.flip

    def fixed(self) -> "OnlineImages":
        """The same images without random crops and flips, for evaluation."""
        return replace(self, crop="", flip=False)

    @cached_property
    def masked(self) -> bool:
        """Whether some images have a loss mask, or padding, so that all get a mask."""
        records = (record for place in self.places if isinstance(place, Mapping) for record in place.values())
        return self.fit == "pad" or any(record.mask is not None for record in records)

    def layout(self, size: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """{name: (shape, dtype)} of what `read` gives for a bucket (height, width)."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"pixel_values": ((3, *size), torch.float32)}
        found |= {"loss_mask": (size, torch.uint8)} if self.masked else {}
        return found | ({"time_ids": ((6,), torch.int64)} if self.time_ids else {})

    def read(
        self, name: str, variant: str, size: tuple[int, int], key: int | None, *, source: int, root: str, where: object
    ) -> _Tensors:
        """The view of an image.

        Args:
            name, variant: the image and which view of it, as in the index.
            size: height and width of its bucket.
            key: of the sample; None: the view that a cache stores.
            source: number of the entry of `dataset_dir`.
            root: folder or URL of that cache.
            where: the row, for messages.

        Returns:
            `pixel_values` (3, H, W), float32 in [-1, 1], perhaps `loss_mask` (H, W), uint8, and `time_ids` (6,).

        Raises:
            CacheError: the image is missing or cannot be read.
        """
        place = self.places[source if len(self.places) > 1 else 0]
        image, mask = self._find(name, root if place is None else place, where)
        try:
            with image.open() as file:
                rgb = to_rgb(file)
            original = (rgb.height, rgb.width)
            if key is None or not (self.crop or self.flip):
                view = view_of(variant, name, original, size, self.fit)
            else:
                view = random_view(variant, name, key, original, size, self.crop, self.flip, self.fit)
            found = {"pixel_values": torch.from_numpy(fit_pixels(rgb, view))}
        except Exception as error:  # PIL lets through whatever its decoders raise
            raise CacheError(
                f"{where}: {unreadable(error)}. Mend the file, or leave its row out of the cache: `sciflow-hf cache "
                "build` skips and counts what cannot be read."
            ) from error
        if self.masked:
            try:
                grey = None if mask is None else to_rgb(mask.open())
                found["loss_mask"] = torch.from_numpy(np.array(fit_mask(grey, view)))
            except Exception as error:  # PIL lets through whatever its decoders raise
                raise CacheError(f"{where}: unusable loss mask ({first_line(error)}).") from error
        if self.time_ids:
            found["time_ids"] = torch.tensor([*view.original, *view.crop, *view.size])
        return found

    def _find(self, name: str, place: Mapping[str, Record] | str, where: object) -> tuple[Stored, Stored | None]:
        """The files of an image and of its mask."""
        if isinstance(place, Mapping):
            if name in place:
                return place[name].image, place[name].mask
            raise CacheError(f"{where}: `input_dir` has no image of that name. Was the cache built from other images?")
        file = storage.join(place, name)
        if not name or not storage.inside(name, place) or not storage.exists(file):
            raise CacheError(
                f"{where}: there is no image {file}. Say where the images of the index (column `image_path`) are by "
                "`--image_dir`, or name what the cache was built from by `--input_dir`."
            )
        return Stored(partial(storage.read_all if storage.is_url(file) else Path, file)), None

    def encoded(self, batch: _Tensors, dtype: torch.dtype) -> _Tensors:
        """Latents in `dtype` of `pixel_values` (B, 3, H, W), which are taken from the batch; masks of their size."""
        parts = [self.encode(some) for some in batch.pop("pixel_values").split(self.batch_size)]
        found = {name: torch.cat([part[name] for part in parts]).to(dtype) for name in parts[0]}
        if "loss_mask" in batch:
            size: Any = tuple(found["latents"].shape[-2:])
            masks = [average_mask(Image.fromarray(mask.numpy()), size) for mask in batch["loss_mask"]]
            found["loss_mask"] = torch.from_numpy(np.stack(masks)).to(found["latents"].device)
        return found
