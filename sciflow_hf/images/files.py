"""Image files with the values they hold: 8- and 16-bit PNG, TIFF, OME-TIFF, npy, npz. Nothing becomes RGB."""

import logging
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..data.build.sources.listing import NO_TARGET, image_suffixes, list_files
from ..errors import SciflowError, counted

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".tif", ".tiff", ".npy", ".npz")
MAX_CHANNELS = 16
SATURATED = 0.5  # share of pixels at the largest value of the type, from which a plane tells nothing
_PNG_MODES = {"L": np.uint8, "RGB": np.uint8, "I;16": np.uint16}


@dataclass(frozen=True)
class ImageFile:
    """Content of one file.

    Attributes:
        path: the file.
        planes: (P, C, H, W), in the file's own type: uint8, uint16, or a floating type.
        axes: of the file's own array, in tifffile's letters: Y and X, C or S for channels, others count planes.
        shape: of the file's own array.
    """

    path: Path
    planes: np.ndarray
    axes: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.planes.dtype

    def names(self) -> list[str]:
        """A name for each plane: that of the file, with `#3` for plane 3 where there are several."""
        several = len(self.planes) > 1
        return [f"{self.path.name}#{i}" if several else self.path.name for i in range(len(self.planes))]

    def with_planes(self, planes: np.ndarray) -> "ImageFile":
        """The same file with other pixels (P, C, H, W), rounded and clipped to its own type."""
        return replace(self, planes=to_dtype(planes, self.dtype))


def to_dtype(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Intensities as `dtype`: integers are rounded to nearest and clipped to its range."""
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values.astype(np.float64)), limits.min, limits.max).astype(dtype)


def find_images(folder: str | Path, *, option: str = "input_dir") -> list[Path]:
    """The image files below `folder` and linked folders, sorted by name; hidden ones and other kinds are left out.

    Pictures of other formats, and links to nothing, are named in a warning.

    Raises:
        SciflowError: no such folder, or no image in it; names `option`.
    """
    root = Path(folder)
    if not root.is_dir():
        raise SciflowError(f"`{option}` {str(folder)!r}: there is no such folder.")
    listing = list_files(root)
    found = [path for path in listing.files if path.suffix.lower() in SUFFIXES]
    others = image_suffixes() - set(SUFFIXES)
    lost = [path for path in listing.files if path.suffix.lower() in others]
    lost += [path for path, reason in listing.left_out.items() if reason == NO_TARGET]
    some = ", ".join(path.relative_to(root).as_posix() for path in lost[:5])
    if not found:
        there = f"; it holds {some}" if lost else ""
        raise SciflowError(f"`{option}` {str(folder)!r}: no image below it{there}; readable are {', '.join(SUFFIXES)}.")
    if lost:
        text = "`%s`: %s not looked at, as only %s are readable: %s"
        logger.warning(text, option, counted(len(lost), "file"), ", ".join(SUFFIXES), some)
    return found


def read_image(path: str | Path) -> ImageFile:
    """Reads a file as it is: no conversion of type, range or colours.

    PNG: grey of 8 or 16 bits, or three channels of 8. TIFF and OME-TIFF: the first series; C and S (samples) are
    channels, any other axis (T, Z, pages) counts planes. npy, npz (its array `image`, or its only one): (H, W),
    (C, H, W) or (P, C, H, W).

    Raises:
        SciflowError: a file that cannot be read, or whose content has no place here; names the file.
    """
    path = Path(path)
    readers = {".png": _read_png, ".npy": _read_numpy, ".npz": _read_numpy, ".tif": _read_tiff, ".tiff": _read_tiff}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise SciflowError(f"{path}: no image that is read here; use one of {', '.join(SUFFIXES)}.")
    values, axes = reader(path)
    if values.dtype not in (np.uint8, np.uint16) and values.dtype.kind != "f":
        raise SciflowError(f"{path}: its pixels are {values.dtype}. Save them as uint8, uint16 or float32.")
    return ImageFile(path, _to_planes(path, values, axes), axes, values.shape)


def _to_planes(path: Path, values: np.ndarray, axes: str) -> np.ndarray:
    """(P, C, H, W) of an array whose axes have these letters."""
    channels = [i for i, axis in enumerate(axes) if axis in "CS"]
    others = [i for i, axis in enumerate(axes) if axis not in "CSYX"]
    order = [*others, *channels, axes.index("Y"), axes.index("X")]
    shape = [values.shape[i] for i in order]
    count, depth = (int(np.prod(shape[a:b])) for a, b in ((0, len(others)), (len(others), len(order) - 2)))
    if depth > MAX_CHANNELS or 0 in shape:
        raise SciflowError(
            f"{path}: shape {values.shape} ({axes}) would be {depth} channels of {shape[-2]} x {shape[-1]} pixels, and "
            f"1 to {MAX_CHANNELS} are taken. Arrays are (H, W), (C, H, W) or (P, C, H, W): channels come first."
        )
    return values.transpose(order).reshape(count, depth, *shape[-2:])


def _read_png(path: Path) -> tuple[np.ndarray, str]:
    try:
        with path.open("rb") as file:
            header = file.read(26)
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise SciflowError(f"{path}: unreadable image ({error}). Save it again, or take it out.") from error
    depth, colours = header[24], header[25]
    if mode not in _PNG_MODES or (depth == 16) != (mode == "I;16"):  # Pillow cuts colours of 16 bits to 8
        raise SciflowError(
            f"{path}: a PNG of {depth} bits and colour type {colours} (mode {mode}); 8- and 16-bit grey and 8-bit RGB "
            "are read without loss. Save palettes as grey, leave transparency out, and 16-bit colours as TIFF."
        )
    return values, "YXS" if values.ndim == 3 else "YX"


def _read_numpy(path: Path) -> tuple[np.ndarray, str]:
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {"image": loaded}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SciflowError(f"{path}: unreadable array ({error}). Save it again by numpy.save.") from error
    if "image" not in arrays and len(arrays) != 1:
        raise SciflowError(f"{path}: it holds {list(arrays)}; call the image's array `image`.")
    values = arrays["image"] if "image" in arrays else next(iter(arrays.values()))
    if not 2 <= values.ndim <= 4:
        raise SciflowError(f"{path}: shape {values.shape}; arrays are (H, W), (C, H, W) or (P, C, H, W).")
    return values, "QCYX"[-values.ndim :]


def _read_tiff(path: Path) -> tuple[np.ndarray, str]:
    tifffile = import_tifffile()
    try:
        with tifffile.TiffFile(path) as file:
            series, page = file.series[0], file.pages[0]
            palette, values, axes = page.photometric == tifffile.PHOTOMETRIC.PALETTE, series.asarray(), series.axes
    except Exception as error:  # tifffile lets through whatever its decoders and struct raise; the file is named
        raise SciflowError(f"{path}: unreadable TIFF ({error}). Save it again, or take it out.") from error
    if palette or "Y" not in axes or "X" not in axes:
        raise SciflowError(f"{path}: a TIFF of axes {axes}{' with a palette' * palette}; save its intensities as grey.")
    return values, axes


def import_tifffile() -> Any:
    """tifffile, or what to install."""
    try:
        import tifffile
    except ImportError as error:
        raise SciflowError("TIFF files need tifffile: `pip install 'sciflow_hf[microscopy]'`.") from error
    return tifffile


def write_image(image: ImageFile, path: str | Path) -> Path:
    """Writes the planes in their own type and, where the format is that of the file they came from, its layout.

    Args:
        path: its suffix chooses the format.

    Raises:
        SciflowError: what the format cannot hold.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix, planes = path.suffix.lower(), image.planes
    values = _from_planes(image)
    if suffix in (".tif", ".tiff"):
        colours = image.axes.endswith("S")
        ome = path.name.lower().endswith((".ome.tif", ".ome.tiff"))
        import_tifffile().imwrite(
            path, values, photometric="rgb" if colours else "minisblack", ome=ome, metadata={"axes": image.axes}
        )
    elif suffix in (".npy", ".npz"):
        np.save(path, values) if suffix == ".npy" else np.savez(path, image=values)
    elif suffix == ".png":
        grey = planes.shape[:2] == (1, 1) and planes.dtype in (np.uint8, np.uint16)
        if not grey and (planes.shape[:2] != (1, 3) or planes.dtype != np.uint8):
            raise SciflowError(
                f"{path}: PNG holds one plane of grey (uint8, uint16) or of three 8-bit channels, not "
                f"{planes.shape[0]} of {planes.shape[1]} channels in {planes.dtype}. Write TIFF."
            )
        Image.fromarray(planes[0, 0] if grey else planes[0].transpose(1, 2, 0)).save(path)
    else:
        raise SciflowError(f"{path}: no format that is written here; use one of {', '.join(SUFFIXES)}.")
    return path


def _from_planes(image: ImageFile) -> np.ndarray:
    """The file's own order of axes; its height and width may have changed."""
    axes = image.axes
    order = [axis for axis in axes if axis not in "CSYX"] + [axis for axis in axes if axis in "CS"] + ["Y", "X"]
    sizes = dict(zip(axes, image.shape, strict=True)) | dict(zip("YX", image.planes.shape[-2:], strict=True))
    channels = [axis for axis in axes if axis in "CS"]
    if len(channels) == 1:
        sizes[channels[0]] = image.planes.shape[1]
    return image.planes.reshape([sizes[axis] for axis in order]).transpose([order.index(axis) for axis in axes])


def check_plane(plane: np.ndarray, name: str) -> None:
    """Refuses a plane (C, H, W) that would teach nothing or spoil the training.

    Raises:
        SciflowError: NaN or infinite pixels; a channel of one value; a channel half saturated. Names `name`.
    """
    if plane.dtype.kind == "f" and not np.isfinite(plane).all():
        bad = int((~np.isfinite(plane)).sum())
        raise SciflowError(f"{name}: {bad} pixels are NaN or infinite. Fill them, or take the image out.")
    for number, channel in enumerate(plane):
        low, high = channel.min(), channel.max()
        if low == high:
            what = "0" if high == 0 else f"{high}"
            raise SciflowError(f"{name}: every pixel of channel {number} is {what}. Take the image or channel out.")
        if plane.dtype.kind == "f":
            continue
        share = float((channel == np.iinfo(plane.dtype).max).mean())
        if share > SATURATED:
            raise SciflowError(
                f"{name}: {share:.0%} of channel {number} are saturated, at {np.iinfo(plane.dtype).max}. Take the "
                "image out, or record it with less light."
            )
        if share > 0.01:
            logger.warning("%s: %.1f %% of channel %d are saturated.", name, 100 * share, number)
