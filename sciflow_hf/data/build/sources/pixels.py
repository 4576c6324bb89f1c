"""How a stored image is meant to be seen: its size, and its pixels as 8-bit RGB."""

import struct
from typing import IO, TYPE_CHECKING

import numpy as np

from ....errors import first_line

if TYPE_CHECKING:
    from PIL import Image

NOT_NUMBERS = "not_numbers"
"""Key of `Image.info`: how many pixels were NaN or infinite."""
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 are turned by a quarter
_TIFF_SIZE = (0x0100, 0x0101)  # tags: width, height
_PNG_NOTES = (b"eXIf", b"iTXt", b"zTXt", b"tEXt")  # chunks that may hold EXIF or XMP
_ONE_PICTURE = ("MPO", "PSD")  # whose further frames are previews and layers of the first


def unreadable(error: Exception) -> str:
    """Why an image cannot be read, without its name."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "unreadable image (no format that Pillow knows)"
    return f"unreadable image ({getattr(error, 'strerror', None) or first_line(error)})"


def oriented_size(image: "Image.Image") -> tuple[int, int]:
    """(height, width) as the image is meant to be seen; decodes no pixels, but where a PNG has metadata behind them."""
    from PIL import Image

    width, height = image.size
    if image.format == "TIFF":  # newer versions of Pillow have turned `size` already
        width, height = (int(image.tag_v2[tag]) for tag in _TIFF_SIZE)  # type: ignore[attr-defined]
    in_header = image.format == "PNG" and not _has_notes_behind(image.fp)  # type: ignore[attr-defined]
    exif = Image.Image.getexif(image) if in_header else image.getexif()  # PNG's own decodes the pixels first
    return (width, height) if exif.get(_ORIENTATION, 1) in (5, 6, 7, 8) else (height, width)


def _has_notes_behind(file: IO[bytes]) -> bool:
    """Whether a PNG has metadata behind its pixels."""
    here, behind = file.tell(), False
    file.seek(8)
    try:
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if behind and kind in _PNG_NOTES:
                return True
            behind = behind or kind == b"IDAT"
            file.seek(length + 4, 1)
        return False
    finally:
        file.seek(here)


def has_more_frames(image: "Image.Image") -> bool:
    """Whether the file holds further pictures, of an animation or on other pages, which nobody looks at."""
    if image.format in _ONE_PICTURE:
        return False
    try:
        return bool(getattr(image, "is_animated", False)) or (image.format == "TIFF" and image.n_frames > 1)  # type: ignore[attr-defined]
    except Exception:  # the second one is broken; the first may be intact
        return True


def to_rgb(image: "Image.Image") -> "Image.Image":
    """8-bit RGB: rotated according to EXIF, transparency over white, 16-bit grey over its full range.

    Integer and float images beyond 16 bits have no agreed range: they are stretched from their least to their
    largest finite value, floats within [0, 1] apart. NaN is white as what is transparent, infinity the end of the
    range; `info[NOT_NUMBERS]` counts them.

    Raises:
        ValueError: no pixel is finite.
    """
    from PIL import Image, ImageOps

    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:  # else it would be copied
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        finite = np.isfinite(values)
        if not finite.any():
            raise ValueError("all its pixels are NaN or infinite")
        low, high = float(values[finite].min()), float(values[finite].max())
        if image.mode != "F" and low >= 0 and high <= 65535:
            low, high = 0.0, 65535.0
        elif image.mode == "F" and low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        values = (np.nan_to_num(values, nan=high, posinf=high, neginf=low) - low) * (255 / max(high - low, 1e-12))
        grey = np.where(np.isnan(np.asarray(image)), 255, values.round()).astype(np.uint8)
        rgb = Image.fromarray(grey).convert("RGB")
        if bad := int((~finite).sum()):
            rgb.info[NOT_NUMBERS] = bad
        return rgb
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
