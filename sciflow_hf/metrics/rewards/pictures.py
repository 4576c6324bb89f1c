"""Pictures in the columns of a row: an image, the name of its file, its bytes, or a cell of `datasets`."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from PIL import Image


def opened(cell: Any) -> Image.Image:
    """The picture of a cell, in RGB.

    Args:
        cell: a PIL image, a path, bytes of an image file, or {"bytes", "path"} as `datasets` keeps an image.

    Raises:
        OSError: no such file, or no image.
    """
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell["path"]
    if isinstance(cell, Image.Image):
        return cell.convert("RGB")
    with Image.open(BytesIO(cell) if isinstance(cell, bytes) else cell) as image:
        return image.convert("RGB")
