"""`Record`: one captioned image of a source, and `Stored`: the file that it comes from."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

MASK_COLUMN = "loss_mask"
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Stored:
    """An image file, on a disk or in a cell of a table.

    Attributes:
        source: its path, or its bytes; an OSError where there is none. Worker processes are sent it.
    """

    source: Callable[[], Path | bytes]

    def open(self) -> "Image.Image":
        """The image, of which no pixels are read yet."""
        from PIL import Image

        found = self.source()
        return Image.open(BytesIO(found) if isinstance(found, bytes) else found)

    def read(self) -> bytes:
        """All of its bytes."""
        found = self.source()
        return found if isinstance(found, bytes) else found.read_bytes()


@dataclass(frozen=True)
class Record:
    """One image with one caption.

    Attributes:
        name: the image's path relative to the input, with forward slashes.
        caption: its text.
        image: its file.
        columns: further columns for the index.
        mask: the file of its loss mask, which may be missing; None if it has none.
        part: "" for the first caption of the image, then "caption2", "caption3", ...: unique with the name.
        sources: the files of its reference images, in order; with them it is an edit.
        source_names: their names, as `name`.
        edit_mask: of an edit, the changed region: the file of a mask (white: changed), or boxes (left, top, right,
            bottom) in pixels of the image; None if that is not given.
    """

    name: str
    caption: str
    image: Stored
    columns: dict[str, Any] = field(default_factory=dict)
    mask: Stored | None = None
    part: str = ""
    sources: tuple[Stored, ...] = ()
    source_names: tuple[str, ...] = ()
    edit_mask: Stored | tuple[Box, ...] | None = None

    @property
    def sample(self) -> str:
        """Its name in messages: with the part, where it has one."""
        return f"{self.name}#{self.part}" if self.part else self.name


def part_name(number: int) -> str:
    """Name of the part of `variant` for caption `number` of an image, from 0."""
    return f"caption{number + 1}" if number else ""


def not_storable(record: Record) -> str:
    """Name of a text of a record that has no form in UTF-8, and so none in an index; "" if all have one."""
    texts = {"caption": record.caption} | {n: v for n, v in record.columns.items() if isinstance(v, str)}
    return next((name for name, text in texts.items() if not _is_utf8(text)), "")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates, as in "\ud83d"
        return False
    return True


def stored_file(file: Path) -> Stored:
    """An image file."""
    return Stored(functools.partial(Path, file))
