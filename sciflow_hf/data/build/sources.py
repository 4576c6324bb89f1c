"""Captioned images from a folder, parquet files or a `datasets` data set, opened as 8-bit RGB."""

import csv
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import SciflowError

if TYPE_CHECKING:
    import datasets
    from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
_HOW_TO_CAPTION = (
    "Give each image a text file of the same name (fig_1.png, fig_1.txt), or put a metadata.jsonl "
    'beside the images with one line each: {"file_name": "fig_1.png", "caption": "..."}'
)
MASK_COLUMN = "loss_mask"
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 are turned by a quarter


@dataclass(frozen=True)
class Record:
    """One captioned image.

    Attributes:
        name: its path relative to the input, with forward slashes; unique.
        caption: its text.
        num_bytes: size of the encoded image: with the name, tells one version of it from another.
        open: opens it; reads no pixels yet.
        columns: further columns for the index.
        open_mask: opens its loss mask; None if it has none.
        mask_bytes: size of the encoded mask.
    """

    name: str
    caption: str
    num_bytes: int
    open: Callable[[], "Image.Image"]
    columns: dict[str, Any] = field(default_factory=dict)
    open_mask: Callable[[], "Image.Image"] | None = None
    mask_bytes: int = 0


def find_records(
    source: str | os.PathLike[str], *, caption_column: str = "caption", leave_out: Path | None = None
) -> tuple[list[Record], list[tuple[str, str]]]:
    """All captioned images of `source`, in a fixed order, and what had to be left out as (name, reason).

    Args:
        source: a folder of images (captions in metadata.jsonl, metadata.csv or .txt files), a folder written
            by `datasets.Dataset.save_to_disk`, a parquet file or a folder of such, or a Hub data set's name.
        caption_column: column with the captions; where there is no "caption", "text" is taken. A column
            `loss_mask` holds images, or paths of images relative to `source`: white counts, black does not.
        leave_out: folder below `source` that is not part of it (the cache that is being built).

    Raises:
        SciflowError: if there is no such source, no image, or no caption.
    """
    path = Path(source)
    if path.is_dir() and not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        images, tables, notes = _walk(path, leave_out)
        if images:
            return _folder_records(path, images, notes, caption_column)
        if not tables:
            raise SciflowError(
                f"`input_dir` is {str(source)!r}, which holds no images ({', '.join(IMAGE_SUFFIXES)}). "
                f"{_HOW_TO_CAPTION}."
            )
        return _dataset_records(_load_parquet(tables), str(source), caption_column)
    if path.is_file() and path.suffix == ".parquet":
        return _dataset_records(_load_parquet([path]), str(source), caption_column)
    return _dataset_records(_load_dataset(source), str(source), caption_column)


def _walk(folder: Path, leave_out: Path | None) -> tuple[list[Path], list[Path], list[Path]]:
    """Images, parquet files and metadata files below `folder`, each sorted."""
    images: list[Path] = []
    tables: list[Path] = []
    notes: list[Path] = []
    skip = None if leave_out is None else leave_out.resolve()
    for parent, subfolders, files in os.walk(folder):
        subfolders[:] = sorted(s for s in subfolders if not s.startswith(".") and Path(parent, s).resolve() != skip)
        for name in files:
            file = Path(parent, name)
            if name.startswith("."):
                continue
            if file.suffix.lower() in IMAGE_SUFFIXES:
                images.append(file)
            elif file.suffix == ".parquet":
                tables.append(file)
            elif name in METADATA_FILES:
                notes.append(file)
    return sorted(images), sorted(tables), sorted(notes)


def _folder_records(
    folder: Path, images: Sequence[Path], notes: Sequence[Path], caption_column: str
) -> tuple[list[Record], list[tuple[str, str]]]:
    rows: dict[Path, dict[str, Any]] = {}
    for file in notes:
        for row in _read_notes(file):
            rows[Path(os.path.normpath(file.parent / str(row["file_name"])))] = row
    if rows:
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        caption_column = _caption_column(columns, caption_column, " and ".join(map(str, notes)))
    masks = {image: _inside(folder, row.get(MASK_COLUMN)) for image, row in rows.items() if row.get(MASK_COLUMN)}
    only_masks = set(masks.values()) - rows.keys()
    images = [file for file in images if Path(os.path.normpath(file)) not in only_masks]
    records, skipped = [], []
    for file in images:
        name = file.relative_to(folder).as_posix()
        row = rows.pop(Path(os.path.normpath(file)), {})
        beside = file.with_suffix(".txt")
        caption = row.get(caption_column)
        if caption is None and beside.is_file():
            caption = beside.read_text(encoding="utf-8", errors="replace")
        if caption is None or not str(caption).strip():
            skipped.append((name, "no caption"))
            continue
        rest = {key: value for key, value in row.items() if key not in ("file_name", caption_column, MASK_COLUMN)}
        mask = _mask_file(masks.get(Path(os.path.normpath(file))))
        records.append(Record(name, str(caption).strip(), file.stat().st_size, _opener(file), rest, *mask))
    missing = "listed in the metadata, but not an image file in the folder"
    skipped += [(os.path.relpath(file, folder), missing) for file in rows]
    if not records:
        raise SciflowError(
            f"`input_dir` is {str(folder)!r}: none of its {len(images)} images has a caption. {_HOW_TO_CAPTION}."
        )
    return records, skipped


def _inside(folder: Path, path: Any) -> Path:
    return Path(os.path.normpath(folder / str(path)))


def _mask_file(file: Path | None) -> tuple[Callable[[], "Image.Image"] | None, int]:
    """How to open a mask (that may be missing: it is noticed then), and its size in bytes."""
    return (None, 0) if file is None else (_opener(file), file.stat().st_size if file.is_file() else 0)


def _read_notes(file: Path) -> list[dict[str, Any]]:
    """Rows of a metadata.jsonl or metadata.csv."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SciflowError(f"{file} is not in UTF-8 ({error}). Save it in that encoding.") from error
    rows: list[tuple[int, Any]] = []
    if file.suffix == ".csv":
        for number, row in enumerate(csv.DictReader(StringIO(text, newline="")), 2):
            rows.append((number, {key: value or None for key, value in row.items() if key}))
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append((number, json.loads(line)))
                except ValueError as error:
                    raise SciflowError(f"Line {number} of {file} is not JSON ({error}). Mend that line.") from error
    for number, row in rows:
        if not isinstance(row, dict) or not row.get("file_name"):
            raise SciflowError(
                f"Line {number} of {file} has no `file_name`. It must name an image relative to the file."
            )
    return [row for _, row in rows]


def _caption_column(columns: Sequence[str], wanted: str, where: str) -> str:
    if wanted in columns:
        return wanted
    if wanted == "caption" and "text" in columns:
        return "text"
    raise SciflowError(
        f"`caption_column` is {wanted!r}, but {where} has only {', '.join(map(repr, columns))}. Name the "
        "column that holds the captions by `--caption_column`."
    )


def _load_parquet(files: Sequence[Path]) -> "datasets.Dataset":
    import datasets

    try:
        return datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise SciflowError(f"`input_dir`: {files[0]} cannot be read as parquet with images ({error}).") from error


def _load_dataset(source: str | os.PathLike[str]) -> "datasets.Dataset":
    """A folder written by `save_to_disk`, or a data set of the Hub."""
    import datasets

    name = os.fspath(source)
    local = Path(name).exists()
    if not local and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise SciflowError(
            f"`input_dir` is {name!r}, which does not exist. Give a folder of images with captions, a folder "
            "written by `save_to_disk`, parquet files with an `image` column, or a Hub data set (user/name)."
        )
    try:
        data = datasets.load_from_disk(name) if local else datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        kind = "cannot be read as a `datasets` folder" if local else "is neither a folder nor a Hub data set in reach"
        raise SciflowError(f"`input_dir` is {name!r}, which {kind} ({error}).") from error
    if isinstance(data, datasets.Dataset):
        return data
    if "train" not in data and len(data) != 1:
        raise SciflowError(f"`input_dir` is {name!r} with the splits {list(data)}. Save one of them and give that.")
    return data["train"] if "train" in data else next(iter(data.values()))


def _dataset_records(
    data: "datasets.Dataset", where: str, caption_column: str
) -> tuple[list[Record], list[tuple[str, str]]]:
    import datasets

    if "image" not in data.column_names:
        raise SciflowError(f"`input_dir` is {where!r}: it has the columns {data.column_names}, but no `image`.")
    caption_column = _caption_column(data.column_names, caption_column, where)
    pictures = [n for n in ("image", MASK_COLUMN) if isinstance(data.features.get(n), datasets.Image)]
    if "image" not in pictures:
        raise SciflowError(f"`input_dir` is {where!r}: its column `image` holds {data.features['image']}, not images.")
    for name in pictures:
        data = data.cast_column(name, datasets.Image(decode=False))
    plain = [
        name
        for name, feature in data.features.items()
        if name not in ("image", caption_column) and isinstance(feature, datasets.Value) and feature.dtype != "binary"
    ]
    images = data.select_columns(pictures)
    rows = data.select_columns([caption_column, *plain]).to_list()
    found, sizes = [], []
    masks: list[tuple[Callable[[], Image.Image] | None, int]] = []
    for i, stored in enumerate(images):
        found.append(os.path.basename((stored["image"] or {}).get("path") or ""))
        sizes.append(_stored_size(stored["image"]))
        if MASK_COLUMN in pictures:
            size = _stored_size(stored[MASK_COLUMN])
            masks.append((_row_opener(images, i, MASK_COLUMN), size) if stored[MASK_COLUMN] else (None, 0))
        else:
            path = rows[i].pop(MASK_COLUMN, None)
            folder = Path(where) if Path(where).is_dir() else Path(where).parent
            masks.append(_mask_file(_inside(folder, path) if path else None))
    unique = all(found) and len(set(found)) == len(found)
    records, skipped = [], []
    for i, row in enumerate(rows):
        name = found[i] if unique else f"row_{i:08d}"
        caption = row.pop(caption_column)
        if caption is None or not str(caption).strip():
            skipped.append((name, "no caption"))
        else:
            opener = _row_opener(images, i, "image")
            records.append(Record(name, str(caption).strip(), sizes[i], opener, row, *masks[i]))
    if not records:
        raise SciflowError(f"`input_dir` is {where!r}: no row has a caption in the column {caption_column!r}.")
    return records, skipped


def _stored_size(stored: dict[str, Any] | None) -> int:
    if stored and stored.get("bytes"):
        return len(stored["bytes"])
    path = stored and stored.get("path")
    return os.path.getsize(path) if path and os.path.isfile(path) else 0


def _opener(file: Path) -> Callable[[], "Image.Image"]:
    def open_file() -> "Image.Image":
        from PIL import Image

        return Image.open(file)

    return open_file


def _row_opener(images: "datasets.Dataset", row: int, column: str) -> Callable[[], "Image.Image"]:
    def open_row() -> "Image.Image":
        from PIL import Image

        stored = images[row][column] or {}
        if not stored.get("bytes") and not stored.get("path"):
            raise OSError("no image in this row")
        return Image.open(BytesIO(stored["bytes"]) if stored.get("bytes") else stored["path"])

    return open_row


def oriented_size(image: "Image.Image") -> tuple[int, int]:
    """(height, width) as the image is meant to be seen; reads the header only."""
    turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def to_rgb(image: "Image.Image") -> "Image.Image":
    """8-bit RGB: turned as EXIF says, transparency over white, 16-bit grey over its whole range.

    Integer and float images beyond 16 bits have no agreed range: they are stretched from their least to their
    largest value, floats within [0, 1] apart.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        low, high = float(values.min()), float(values.max())
        if image.mode != "F" and low >= 0 and high <= 65535:
            low, high = 0.0, 65535.0
        elif image.mode == "F" and low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        values = (values - low) * (255 / max(high - low, 1e-12))
        return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
