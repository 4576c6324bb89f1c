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
    """A figure as it is written: its file's name, the picture, what it shows, and the paper that it belongs to.

    Of an edit also further columns, among them `source_image`, the name of the picture `source`.
    """

    name: str
    image: "Image"
    caption: str
    paper_id: str
    columns: dict[str, str] = {}  # noqa: RUF012
    source: "Image | None" = None


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
    """Writes an imagefolder: PNG files and `metadata.jsonl` (file_name, caption, paper_id, and a figure's columns)."""
    with new_folder(folder) as target, open(target / "metadata.jsonl", "w", encoding="utf-8") as lines:
        for figure in figures:
            figure.image.save(target / figure.name)
            if figure.source is not None:
                (target / figure.columns["source_image"]).parent.mkdir(exist_ok=True)
                figure.source.save(target / figure.columns["source_image"])
            row = {"file_name": figure.name, "caption": figure.caption, "paper_id": figure.paper_id}
            lines.write(json.dumps(row | figure.columns) + "\n")
    return Path(folder)


def write_pipeline(folder: str | Path, pipeline: Any) -> Path:
    """Writes a pipeline in diffusers layout."""
    with new_folder(folder) as target:
        pipeline.save_pretrained(target)
    return Path(folder)
