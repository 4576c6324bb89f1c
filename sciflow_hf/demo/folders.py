"""Folders that the demo makes at first use: figures with captions, and pipelines. Each is complete or not there."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import SciflowError
from ..files import atomic_folder

if TYPE_CHECKING:
    from PIL.Image import Image


class CaptionedImage(NamedTuple):
    """A figure as it is written: its file's name, the picture, what it shows, and the paper that it belongs to."""

    name: str
    image: "Image"
    caption: str
    paper_id: str


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """`atomic_folder`, but of two processes that make the same folder at once the first one's stays.

    Raises:
        SciflowError: `folder` is a file, or holds something already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SciflowError(f"`folder` is {str(folder)!r}, which is not an empty folder: name another or delete it.")
    try:
        with atomic_folder(folder) as target:
            yield target
    except OSError:
        if not (folder.is_dir() and any(folder.iterdir())):
            raise


def write_figures(folder: str | Path, figures: Iterable[CaptionedImage]) -> Path:
    """Writes an imagefolder: PNG files and `metadata.jsonl` (file_name, caption, paper_id)."""
    with new_folder(folder) as target, open(target / "metadata.jsonl", "w", encoding="utf-8") as lines:
        for figure in figures:
            figure.image.save(target / figure.name)
            row = {"file_name": figure.name, "caption": figure.caption, "paper_id": figure.paper_id}
            lines.write(json.dumps(row) + "\n")
    return Path(folder)


def write_pipeline(folder: str | Path, pipeline: Any) -> Path:
    """Writes a pipeline in diffusers layout."""
    with new_folder(folder) as target:
        pipeline.save_pretrained(target)
    return Path(folder)
