"""Planes of image files below a folder, and what of each is trained on and held out."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..diffusion.randomness import hash64, signed64, uniform
from ..errors import SciflowError
from .files import check_plane, find_images, read_image
from .optics import ForwardModel

if TYPE_CHECKING:
    from .microscopes import MicroscopyDataArguments

IMAGES_HELD = 64  # decoded files kept in memory

Region = tuple[int, int, int, int]
"""top, left, bottom, right, in pixels."""


_Kinds = dict[str, tuple[tuple[int, str], Path]]


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


def find_planes(args: "MicroscopyDataArguments", optics: ForwardModel) -> list[Plane]:
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
    name: str, size: tuple[int, int], args: "MicroscopyDataArguments", margin: int, *, whole: bool
) -> tuple[Region | None, Region | None]:
    """The parts of an image to train on and to hold out; `whole`: all of it is held out."""
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
    train, kept = [0, 0, *size], [0, 0, *size]
    train[axis + 2], kept[axis] = start - margin, start
    return (train[0], train[1], train[2], train[3]), (kept[0], kept[1], kept[2], kept[3])


def _held_out(specimens: Sequence[str], args: "MicroscopyDataArguments") -> set[str]:
    """Specimens that are held out whole."""
    unknown = sorted(set(args.eval_specimens) - set(specimens))
    if unknown:
        raise SciflowError(f"`eval_specimens` {unknown}: the specimens are {list(specimens)}.")
    if args.split == "fold":
        if len(specimens) < args.num_folds:
            raise SciflowError(f"`num_folds` {args.num_folds}: there are only {len(specimens)} specimens.")
        order = sorted(specimens, key=lambda name: hash64(name, "fold"))
        return {*args.eval_specimens, *order[args.fold :: args.num_folds]}
    if args.split == "region":
        return set(args.eval_specimens)
    by_hash = {s for s in specimens if uniform([signed64(hash64(s))], stream="split").item() < args.eval_fraction}
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
    by_name = {_key(file.relative_to(other)): file for file in find_images(other, option="conditioning_dir")}
    missing = [file for file in files if _key(file.relative_to(root)) not in by_name]
    if missing:
        raise SciflowError(f"`conditioning_dir` {conditioning_dir!r}: no image for {missing[0].relative_to(root)}.")
    return {file: by_name[_key(file.relative_to(root))] for file in files}


def _key(path: Path) -> str:
    return (path.parent / path.name.split(".")[0]).as_posix()


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
