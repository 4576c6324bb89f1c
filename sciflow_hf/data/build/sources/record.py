"""`Record`: one captioned image of a source."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

MASK_COLUMN = "loss_mask"


@dataclass(frozen=True)
class Record:
    """One image with one caption.

    Attributes:
        name: the image's path relative to the input, with forward slashes.
        caption: its text.
        num_bytes: size of the encoded image: with the name, tells one version of it from another.
        open: opens it; reads no pixels yet.
        columns: further columns for the index.
        open_mask: opens its loss mask; None if it has none.
        mask_bytes: size of the encoded mask.
        part: "" for the first caption of the image, then "caption2", "caption3", ...: unique with the name.
    """

    name: str
    caption: str
    num_bytes: int
    open: Callable[[], "Image.Image"]
    columns: dict[str, Any] = field(default_factory=dict)
    open_mask: Callable[[], "Image.Image"] | None = None
    mask_bytes: int = 0
    part: str = ""


def part_name(number: int) -> str:
    """Of the caption `number` of an image, from 0."""
    return f"caption{number + 1}" if number else ""


def not_storable(record: Record) -> str:
    """What of a record has no form in UTF-8, and so none in an index; "" if all has."""
    texts = {"caption": record.caption} | {n: v for n, v in record.columns.items() if isinstance(v, str)}
    return next((name for name, text in texts.items() if not _is_utf8(text)), "")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates, as in "\ud83d"
        return False
    return True


def file_opener(file: Path) -> Callable[[], "Image.Image"]:
    """Opens an image file."""

    def open_file() -> "Image.Image":
        from PIL import Image

        return Image.open(file)

    return open_file


def mask_file(file: Path | None) -> tuple[Callable[[], "Image.Image"] | None, int]:
    """How to open a mask (that may be missing: it is noticed then), and its size in bytes."""
    return (None, 0) if file is None else (file_opener(file), file.stat().st_size if file.is_file() else 0)
