"""Microscope images as a data set of tiles: sharp ones beside measured ones, or measured ones made by optics."""

import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..diffusion.randomness import hash64, signed64, uniform
from ..errors import SciflowError
from .optics import ForwardModel
from .planes import Plane, Region, find_planes, planes_of
from .tiles import turned
from .transforms import IntensityTransform

logger = logging.getLogger(__name__)

SPLITS = ("specimen", "fold", "region")
FIT_PIXELS = 2_000_000  # per channel, of all images together, that the intensity transform is fitted to


@dataclass
class MicroscopyDataArguments:
    """Images of a run.

    Args:
        input_dir: folder of sharp images: png, tif, ome.tif, npy, npz; all of one type and number of channels.
        conditioning_dir: folder of measured images of the same names and sizes; without, the forward model makes
            them from the sharp ones, with new noise in every epoch.
        tile_size: pixels of a square training tile.
        augment: move tiles by up to half their size, mirror and turn them, anew in every epoch.
        split: what `eval_fraction` or `fold` holds out: whole specimens ("specimen", "fold": cross-validation), or a
            strip of every image ("region": self-validation), with a margin between.
        eval_fraction: share of the specimens or of every image; 0 for none. "fold" does not read it.
        num_folds, fold: of cross-validation: specimens are dealt to folds by hash, and this one is held out.
        split_margin: pixels between the two parts of an image; at least the reach of the PSF.
        eval_specimens: specimens that are held out whole, whatever the split.
        specimen_pattern: regular expression whose first group, searched in the path below `input_dir`, names the
            specimen; default: the first folder, or the file's stem where there is none.
        intensity_transform: percentile, anscombe or log; fitted to the training part, saved with the network.
        intensity_percentiles: that become -1 and 1.
        intensity_gain: intensity of one photon (anscombe), or where log sets in; 0: from the forward model, else 1.
    """

    input_dir: str = field(metadata={"help": "Folder of sharp images: png, tif, ome.tif, npy, npz."})
    conditioning_dir: str | None = field(
        default=None, metadata={"help": "Folder of measured images of the same names; default: the forward model's."}
    )
    tile_size: int = field(default=64, metadata={"help": "Pixels of a square training tile."})
    augment: bool = field(default=True, metadata={"help": "Move, mirror and turn tiles, anew in every epoch."})
    split: str = field(default="specimen", metadata={"help": f"What is held out: {', '.join(SPLITS)}."})
    eval_fraction: float = field(default=0.1, metadata={"help": "Share of specimens, or of every image, held out."})
    num_folds: int = field(default=5, metadata={"help": "Folds of --split fold."})
    fold: int = field(default=0, metadata={"help": "The fold that is held out, from 0."})
    split_margin: int = field(default=16, metadata={"help": "Pixels between the two parts of --split region."})
    eval_specimens: list[str] = field(default_factory=list, metadata={"help": "Specimens held out whole."})
    specimen_pattern: str | None = field(
        default=None, metadata={"help": "Regular expression whose first group names the specimen in the path."}
    )
    intensity_transform: str = field(default="percentile", metadata={"help": "percentile, anscombe or log."})
    intensity_percentiles: list[float] = field(
        default_factory=lambda: [0.1, 99.9], metadata={"help": "Percentiles that become -1 and 1."}
    )
    intensity_gain: float = field(default=0.0, metadata={"help": "Intensity of a photon; 0: from the forward model."})

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise SciflowError(f"`split` {self.split!r}: use one of {', '.join(SPLITS)}.")
        if self.tile_size < 8:
            raise SciflowError(f"`tile_size` {self.tile_size}: at least 8 pixels.")
        if not 0 <= self.eval_fraction < 1:
            raise SciflowError(f"`eval_fraction` {self.eval_fraction}: in [0, 1).")
        if self.num_folds < 2 or not 0 <= self.fold < self.num_folds:
            raise SciflowError(f"`fold` {self.fold} of `num_folds` {self.num_folds}: 0 to one less than the folds.")
        if self.split_margin < 0:
            raise SciflowError(f"`split_margin` {self.split_margin}: 0 or more.")
        try:
            groups = re.compile(self.specimen_pattern or "()").groups
        except re.error as error:
            raise SciflowError(f"`specimen_pattern` {self.specimen_pattern!r}: {error}.") from error
        if not groups:
            raise SciflowError(f"`specimen_pattern` {self.specimen_pattern!r}: put ( ) around the specimen's name.")

    def names(self) -> list[str]:
        """Names of the data for a model card."""
        return [Path(self.input_dir).resolve().name]


class MicroscopyTiles(Dataset[dict[str, torch.Tensor]]):
    """Tiles of images as `pixel_values` (C, t, t) and `conditioning_pixel_values` (C', t, t), in the network's units.

    Args:
        planes: with a `train` or `held_out` part, whichever `part` says.
        part: "train" or "held_out".
        transform, conditioning_transform: of the sharp and of the measured images.
        optics: makes measured tiles from sharp ones; None: they are read.
        tile_size: pixels.
        augment: draw place, mirror and turn of a tile from its key.

    Attributes:
        buckets, row_ids, groups, fingerprint: what the trainer wants to know; a group is a specimen.
    """

    def __init__(
        self,
        planes: Sequence[Plane],
        part: str,
        *,
        transform: IntensityTransform,
        conditioning_transform: IntensityTransform,
        optics: ForwardModel | None,
        tile_size: int,
        augment: bool = False,
    ) -> None:
        self.transform, self.conditioning_transform = transform, conditioning_transform
        self.optics, self.tile_size, self.augment = optics, tile_size, augment
        self.tiles: list[tuple[Plane, Region, int, int]] = []
        for plane in planes:
            region: Region | None = getattr(plane, part)
            if region is not None:
                tops, lefts = (_starts(region[i], region[i + 2], tile_size) for i in (0, 1))
                self.tiles += [(plane, region, top, left) for top in tops for left in lefts]
        self.row_ids = [f"{plane.name}@{top},{left}" for plane, _, top, left in self.tiles]
        self.groups = [plane.specimen for plane, *_ in self.tiles]
        self.buckets = [(tile_size, tile_size)] * len(self.tiles)
        made = [transform.to_dict(), conditioning_transform.to_dict(), asdict(optics) if optics else None, augment]
        files = [(plane.name, plane.path.stat().st_size, region, top, left) for plane, region, top, left in self.tiles]
        self.fingerprint = f"{hash64(json.dumps([made, files], default=str)):016x}"

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self.keyed(row, self.key_of(row))

    def key_of(self, row: int) -> int:
        """A key that follows from the row's name alone."""
        return signed64(hash64(self.row_ids[row]))

    def describe(self, row: int) -> str:
        """A row in words, for messages."""
        return self.row_ids[row]

    def keyed(self, row: int, key: int) -> dict[str, torch.Tensor]:
        """The tile of a row; what is random of it (place, turn, photons) follows from `key`."""
        sharp, measured = self.intensities(row, key)
        return {
            "pixel_values": self.transform(sharp),
            "conditioning_pixel_values": self.conditioning_transform(measured),
        }

    def intensities(self, row: int, key: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The sharp and the measured tile in the files' units, float32."""
        plane, region, top, left = self.tiles[row]
        if self.augment:
            top, left = (self._moved(region, i, start, key) for i, start in ((0, top), (1, left)))
        turn = int(uniform([key], stream="turn").item() * 8) if self.augment else 0
        margin = self.optics.radius if self.optics else 0
        sharp = turned(self._cut(plane.path, plane, top, left, margin), turn)
        if self.optics is None or plane.conditioning_path is not None:
            return sharp, turned(self._cut(plane.conditioning_path or plane.path, plane, top, left, 0), turn)
        inner = slice(margin, margin + self.tile_size)
        expected = self.optics.expected_photons(sharp[None])[..., inner, inner]
        return sharp[:, inner, inner], self.optics.to_intensities(self.optics.detect(expected, [key]))[0]

    def _moved(self, region: Region, axis: int, start: int, key: int) -> int:
        """A start up to half a tile away, within the region."""
        low = max(region[axis], start - self.tile_size // 2)
        high = min(region[axis + 2] - self.tile_size, start + self.tile_size // 2)
        return low + int(uniform([key], stream=f"tile{axis}").item() * (high - low + 1))

    def _cut(self, path: Path, plane: Plane, top: int, left: int, margin: int) -> torch.Tensor:
        """(C, t + 2 margin, t + 2 margin), mirrored beyond the image's border."""
        rows, columns = (
            _mirrored(np.arange(start - margin, start + self.tile_size + margin), size)
            for start, size in zip((top, left), plane.size, strict=True)
        )
        return torch.from_numpy(planes_of(path)[plane.number][:, rows[:, None], columns].astype(np.float32))


def _starts(low: int, high: int, tile: int) -> list[int]:
    """Where tiles begin that cover [low, high); the last one ends there."""
    count = math.ceil((high - low) / tile)
    return [round(low + i * (high - low - tile) / max(count - 1, 1)) for i in range(count)]


def _mirrored(index: np.ndarray, size: int) -> np.ndarray:
    index = np.abs(index)
    return (size - 1) - np.abs((size - 1) - index)


# -- from a folder -------------------------------------------------------------------------------------------------


def load_microscopy_images(
    args: MicroscopyDataArguments,
    optics: ForwardModel,
    *,
    transforms: tuple[IntensityTransform, IntensityTransform] | None = None,
) -> tuple[MicroscopyTiles, MicroscopyTiles | None]:
    """The training and the held-out tiles of a folder; None where nothing is held out.

    Sets `optics.white_level` where it is 0. Every file is read once.

    Args:
        transforms: of the sharp and the measured images, of a network that is gone on with; fitted by default.

    Raises:
        SciflowError: images of mixed types, channels or pairs, pixels that teach nothing, sizes that do not go
            together; names file and remedy.
    """
    planes = find_planes(args, optics)
    if not any(plane.train for plane in planes):
        raise SciflowError(
            f"`eval_fraction` {args.eval_fraction}, `eval_specimens` {args.eval_specimens}: nothing is left to train "
            f"on of the specimens {sorted({plane.specimen for plane in planes})}. Hold fewer out."
        )
    paired = args.conditioning_dir is not None
    transform, measured = transforms or _fitted(args, planes, optics, paired=paired)
    if not optics.white_level:
        optics.white_level = max(transform.high)
    options: dict[str, Any] = {"transform": transform, "conditioning_transform": measured, "tile_size": args.tile_size}
    options["optics"] = None if paired else optics
    tiles = MicroscopyTiles(planes, "train", augment=args.augment, **options)
    held_out = MicroscopyTiles(planes, "held_out", **options) if any(plane.held_out for plane in planes) else None
    logger.info("%d tiles of %d pixels to train on, %d held out.", len(tiles), args.tile_size, len(held_out or []))
    return tiles, held_out


def _fitted(
    args: MicroscopyDataArguments, planes: Sequence[Plane], optics: ForwardModel, *, paired: bool
) -> tuple[IntensityTransform, IntensityTransform]:
    """The transforms of the training parts."""
    train = [plane for plane in planes if plane.train]
    area = sum((p.train[2] - p.train[0]) * (p.train[3] - p.train[1]) for p in train if p.train)
    step, percentiles = max(1, area // FIT_PIXELS), args.intensity_percentiles
    sharp = _pixels(train, step, lambda plane: plane.path)
    if args.intensity_gain or paired:
        gain = args.intensity_gain or 1.0
    else:
        white = optics.white_level or max(IntensityTransform.fit(sharp, percentiles=percentiles).high)
        gain = white / optics.photons
    options: dict[str, Any] = {"kind": args.intensity_transform, "percentiles": percentiles, "gain": gain}
    transform = IntensityTransform.fit(sharp, **options)
    if not paired:
        return transform, transform
    return transform, IntensityTransform.fit(_pixels(train, step, lambda p: p.conditioning_path or p.path), **options)


def _pixels(planes: Sequence[Plane], step: int, path_of: Callable[[Plane], Path]) -> list[np.ndarray]:
    """Every `step`-th pixel of the training parts, (C, n) each."""
    found = []
    for plane in planes:
        top, left, bottom, right = plane.train or (0, 0, 0, 0)
        pixels = planes_of(path_of(plane))[plane.number][:, top:bottom, left:right]
        found.append(pixels.reshape(len(pixels), -1)[:, ::step])
    return found
