"""Microscope images as a data set of tiles: sharp ones with measured ones, or measured ones made by optics."""

import functools
import itertools
import json
import logging
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from ..data.batches.loader import seeded
from ..data.split import spread
from ..diffusion.randomness import hash64, signed64, uniform
from ..errors import SciflowError, counted
from ..options import Options, arguments, option
from .files import check_plane, find_images, read_image
from .optics import ForwardModel
from .tiles import turned
from .transforms import KINDS, IntensityTransform

logger = logging.getLogger(__name__)

SPLITS = ("specimen", "fold", "region")
FIT_PIXELS = 2_000_000  # per channel, of all images together, that the intensity transform is fitted to
FIT_SAMPLES = 256  # of a data set that is no `MicroscopyTiles`
IMAGES_HELD = 64  # decoded files kept in memory

Region = tuple[int, int, int, int]
"""top, left, bottom, right, in pixels."""
_Kinds = dict[str, tuple[tuple[int, str], Path]]


def _check_fold(args: "MicroscopyDataArguments") -> None:
    if args.fold >= args.num_folds:
        raise SciflowError(f"`fold` {args.fold} of `num_folds` {args.num_folds}: 0 to one less than the folds.")


def _check_specimen_pattern(args: "MicroscopyDataArguments") -> None:
    try:
        groups = re.compile(args.specimen_pattern or "()").groups
    except re.error as error:
        raise SciflowError(f"`specimen_pattern` {args.specimen_pattern!r}: {error}.") from error
    if not groups:
        raise SciflowError(f"`specimen_pattern` {args.specimen_pattern!r}: put ( ) around the specimen's name.")


@arguments
class MicroscopyDataArguments(Options):
    """Microscope images of a run, and what of them is held out."""

    heading: ClassVar[str] = "Microscope images"

    input_dir: str = option(
        help="Folder of sharp images: png, tif, ome.tif, npy, npz; all of one type and number of channels."
    )
    conditioning_dir: str | None = option(
        None,
        "Folder of measured images of the same names and sizes; without, the forward model makes them from the sharp "
        "ones, with new noise in every epoch.",
    )
    tile_size: int = option(64, "Pixels of a square training tile.", within="[8, inf)")
    augment: bool = option(True, "Move tiles by up to half their size, mirror and turn them, anew in every epoch.")
    split: str = option(
        "specimen",
        "Part held out by `--eval_fraction` or `--fold`: complete specimens (specimen; fold: cross-validation), or a "
        "strip of every image (region: self-validation), with a margin between.",
        choices=SPLITS,
    )
    eval_fraction: float = option(
        0.1, "Share of the specimens, or of every image, held out; `--split fold` does not read it.", within="[0, 1)"
    )
    num_folds: int = option(5, "Folds of `--split fold`: specimens are dealt to them by hash.", within="[2, inf)")
    fold: int = option(0, "The fold that is held out, from 0.", within="[0, inf)", check=_check_fold)
    split_margin: int = option(
        16,
        "Pixels between the two parts of an image in `--split region`; at least the reach of the PSF.",
        within="[0, inf)",
    )
    eval_specimens: list[str] = option([], "Specimens that are held out completely, whatever the split.")
    specimen_pattern: str | None = option(
        None,
        "Regular expression whose first group, searched in the path below `--input_dir`, names the specimen; by "
        "default the first folder, or the file's stem where there is none.",
        check=_check_specimen_pattern,
    )
    intensity_transform: str = option(
        "percentile",
        "How intensities are scaled; fitted to the training part, saved with the network.",
        choices=KINDS,
    )
    intensity_percentiles: list[float] = option([0.1, 99.9], "Percentiles that become -1 and 1.", within="[0, 100]")
    intensity_gain: float = option(
        0.0,
        "Intensity of one photon (anscombe), or where the logarithm sets in (log); 0: from the forward model, else 1.",
        within="[0, inf)",
    )

    def names(self) -> list[str]:
        """Names of the data for a model card."""
        return [Path(self.input_dir).resolve().name]


@dataclass(frozen=True)
class Plane:
    """One plane of one file, with the parts to train on and to hold out."""

    path: Path
    conditioning_path: Path | None
    number: int
    name: str
    specimen: str
    size: tuple[int, int]
    train: Region | None
    held_out: Region | None


@functools.lru_cache(maxsize=IMAGES_HELD)
def planes_of(path: Path) -> np.ndarray:
    """(P, C, H, W) of a file, kept for the next tile."""
    return read_image(path).planes


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
    count, held = counted(len(tiles), "tile"), len(held_out or [])
    logger.info("%s of %d pixels to train on, %d held out.", count, args.tile_size, held)
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


# -- from a data set of one's own ----------------------------------------------------------------------------------


def fit_to_samples(dataset: Any, **options: Any) -> tuple[IntensityTransform, IntensityTransform, int]:
    """Transforms of `pixel_values` and `conditioning_pixel_values`, (C, H, W) each, and the smallest side in pixels.

    They are fitted to up to `FIT_SAMPLES` samples spread over it, of a stream to the first ones.

    Args:
        options: of `IntensityTransform.fit`.

    Raises:
        SciflowError: samples without these images, of other shapes, or with NaN or infinity.
    """
    pixels: dict[str, list[np.ndarray]] = {"pixel_values": [], "conditioning_pixel_values": []}
    sides: set[int] = set()
    for number, sample in _some(dataset):
        for name, found in pixels.items():
            if name not in sample:
                raise SciflowError(
                    f"sample {number} has no `{name}` to fit an intensity transform to: {sorted(sample)}."
                )
            image = np.asarray(sample[name])
            if image.ndim != 3 or (found and len(image) != len(found[0])):
                wanted = f"({len(found[0])}, H, W) as in those before" if found else "(C, H, W)"
                raise SciflowError(f"sample {number} has `{name}` {image.shape}: {wanted} is wanted.")
            if not np.isfinite(image).all():
                raise SciflowError(f"sample {number} has NaN or infinity in `{name}`: take it out.")
            sides |= {*image.shape[1:]}
            step = max(1, image[0].size * FIT_SAMPLES // FIT_PIXELS)
            found.append(image.reshape(len(image), -1)[:, ::step])
    if not sides:
        raise SciflowError("the data set is empty: there are no intensities to fit a transform to.")
    sharp, measured = (IntensityTransform.fit(found, **options) for found in pixels.values())
    return sharp, measured, min(sides)


def _some(dataset: Any) -> Iterator[tuple[int, Any]]:
    """Numbers and samples; what is drawn in a map-style data set follows from the number."""
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        yield from enumerate(itertools.islice(dataset, FIT_SAMPLES))
        return
    for row in spread(len(dataset), min(len(dataset), FIT_SAMPLES)):
        with seeded(int(row)):
            sample = dataset[int(row)]
        yield int(row), sample


# -- planes and their parts ------------------------------------------------------------------------------------------


def find_planes(args: MicroscopyDataArguments, optics: ForwardModel) -> list[Plane]:
    """The planes of the files below `args.input_dir`, checked; every file is read once."""
    root = Path(args.input_dir)
    files = find_images(root)
    partners = _partners(root, files, args.conditioning_dir)
    specimens = {file: _specimen(file.relative_to(root), args.specimen_pattern) for file in files}
    held_out = _held_out(sorted(set(specimens.values())), args)
    planes: list[Plane] = []
    kinds: _Kinds = {}
    for file in files:
        image = read_image(file)
        _same_kind(kinds, "input_dir", file, image.planes)
        partner = partners.get(file)
        if partner is not None:
            _check_partner(kinds, file, image.planes, partner)
        size = image.planes.shape[-2], image.planes.shape[-1]
        _check_size(file, size, args.tile_size, None if partner else optics)
        for number, plane in enumerate(image.planes):
            name = file.relative_to(root).as_posix() + (f"#{number}" if len(image.planes) > 1 else "")
            check_plane(plane, name)
            margin = max(args.split_margin, 0 if partner else optics.radius)
            train, kept = _regions(name, size, args, margin, whole=specimens[file] in held_out)
            planes.append(Plane(file, partner, number, name, specimens[file], size, train, kept))
    return planes


def _regions(
    name: str, size: tuple[int, int], args: MicroscopyDataArguments, margin: int, *, whole: bool
) -> tuple[Region | None, Region | None]:
    """The parts of an image to train on and to hold out; `whole`: hold out all of it."""
    everything = (0, 0, *size)
    if whole or args.split != "region" or not args.eval_fraction:
        return (None, everything) if whole else (everything, None)
    axis = int(size[1] > size[0])  # a strip at the end of the longer side
    start = round(size[axis] * (1 - args.eval_fraction))
    if start - margin < args.tile_size or size[axis] - start < args.tile_size:
        raise SciflowError(
            f"{name}: of its {size[axis]} pixels `eval_fraction` {args.eval_fraction} leaves {start - margin} to train "
            f"on and {size[axis] - start} held out, and a tile has {args.tile_size}. Lower `tile_size`, change "
            "`eval_fraction`, or take `--split specimen`."
        )
    if axis:
        return (0, 0, size[0], start - margin), (0, start, *size)
    return (0, 0, start - margin, size[1]), (start, 0, *size)


def _held_out(specimens: Sequence[str], args: MicroscopyDataArguments) -> set[str]:
    """Specimens that are held out completely."""
    unknown = sorted(set(args.eval_specimens) - set(specimens))
    if unknown:
        raise SciflowError(f"`eval_specimens` {unknown}: the specimens are {list(specimens)}.")
    if args.split == "fold":
        if len(specimens) < args.num_folds:
            raise SciflowError(
                f"`num_folds` {args.num_folds}: the images are of {counted(len(specimens), 'specimen')}."
            )
        order = sorted(specimens, key=lambda name: hash64(name, "fold"))
        return {*args.eval_specimens, *order[args.fold :: args.num_folds]}
    if args.split == "region":
        return set(args.eval_specimens)
    place = {s: uniform([signed64(hash64(s))], stream="split").item() for s in specimens}
    by_hash = {s for s in specimens if place[s] < args.eval_fraction}
    if args.eval_fraction and not by_hash and not args.eval_specimens and len(specimens) > 1:
        by_hash = {min(specimens, key=place.__getitem__)}  # as `data.split.stand_in`
    return {*args.eval_specimens, *by_hash}


def _specimen(path: Path, pattern: str | None) -> str:
    if pattern is None:
        return path.parts[0] if len(path.parts) > 1 else path.name.split(".")[0]
    match = re.search(pattern, path.as_posix())
    if match is None:
        raise SciflowError(f"`specimen_pattern` {pattern!r} finds nothing in {path.as_posix()!r}.")
    return match[1]


def _partners(root: Path, files: Sequence[Path], conditioning_dir: str | None) -> dict[Path, Path]:
    """Sharp file -> measured file of the same path, but for the suffix."""
    if conditioning_dir is None:
        return {}
    other = Path(conditioning_dir)
    sharp = _by_key(root, files, "input_dir")
    measured = _by_key(other, find_images(other, option="conditioning_dir"), "conditioning_dir")
    if missing := [file for key, file in sharp.items() if key not in measured]:
        raise SciflowError(f"`conditioning_dir` {conditioning_dir!r}: no image for {missing[0].relative_to(root)}.")
    if spare := [file for key, file in measured.items() if key not in sharp]:
        some = ", ".join(file.relative_to(other).as_posix() for file in spare[:5])
        logger.warning(
            "`conditioning_dir`: %s without a sharp one, not looked at: %s", counted(len(spare), "image"), some
        )
    return {file: measured[key] for key, file in sharp.items()}


def _by_key(root: Path, files: Sequence[Path], option: str) -> dict[str, Path]:
    """The files by what a pair has in common: the path but for the suffix.

    Raises:
        SciflowError: two files have the same.
    """
    found: dict[str, Path] = {}
    for file in files:
        path = file.relative_to(root)
        key = unicodedata.normalize("NFC", (path.parent / path.name.split(".")[0]).as_posix())
        if found.setdefault(key, file) is not file:
            raise SciflowError(
                f"`{option}`: {found[key].relative_to(root)} and {path} are both {key!r}: in pairs the name up to its "
                "first dot tells images apart. Rename one."
            )
    return found


def _same_kind(kinds: _Kinds, option: str, file: Path, planes: np.ndarray) -> None:
    kind = planes.shape[1], str(planes.dtype)
    first, other = kinds.setdefault(option, (kind, file))
    if kind != first:
        raise SciflowError(
            f"{file}: {kind[0]} channels of {kind[1]}, but {other} has {first[0]} of {first[1]}. Images of one "
            f"`{option}` must be alike: convert them, or train on one kind."
        )


def _check_partner(kinds: _Kinds, file: Path, sharp: np.ndarray, partner: Path) -> None:
    planes = read_image(partner).planes
    _same_kind(kinds, "conditioning_dir", partner, planes)
    if (len(planes), planes.shape[-2:]) != (len(sharp), sharp.shape[-2:]):
        raise SciflowError(
            f"{partner}: {len(planes)} planes of {planes.shape[-2:]} pixels, but {file} has {len(sharp)} of "
            f"{sharp.shape[-2:]}. Register and resample the pair to one size."
        )
    for number, plane in enumerate(planes):
        check_plane(plane, f"{partner.name}#{number}")


def _check_size(file: Path, size: tuple[int, int], tile_size: int, optics: ForwardModel | None) -> None:
    if min(size) < tile_size:
        raise SciflowError(
            f"{file}: {size[0]} x {size[1]} pixels, smaller than `tile_size` {tile_size}. Lower it, or take the "
            "image out."
        )
    if optics is not None and optics.radius >= min(size):
        raise SciflowError(
            f"{file}: {size[0]} x {size[1]} pixels, but `psf` {optics.psf} is {len(optics.kernel)} wide, larger than "
            "the image. Take a smaller PSF, or the image out."
        )
