"""Captioned images in tables: parquet files, folders written by `save_to_disk`, data sets of the Hub."""

import functools
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ....errors import SciflowError
from ..tally import Tally
from .captions import texts_of
from .folder import caption_column
from .record import MASK_COLUMN, Record, Stored, part_name, stored_file
from .splits import choose_splits, split_of_table

if TYPE_CHECKING:
    import datasets

_BINARY = ("binary", "large_binary", "binary_view")
_TEXT = ("string", "large_string", "string_view")


def parquet_records(folder: Path, files: Sequence[Path], column: str, split: str | None) -> tuple[list[Record], Tally]:
    """The captioned images of parquet files in `folder`, of the chosen splits."""
    splits = {file: split_of_table(file.relative_to(folder)) for file in files}
    there = sorted({name for name in splits.values() if name})
    if there and "train" not in there and None in splits.values():  # figures.parquet, figures_test.parquet
        splits, there = {file: name or "train" for file, name in splits.items()}, ["train", *there]
    chosen = choose_splits(there, split, str(folder))
    taken = [file for file, name in splits.items() if not there or name in chosen]
    records, tally = dataset_records(load_parquet(taken), str(folder), column)
    tally.used = len(taken)
    for file, name in splits.items():
        if file not in taken:
            reason = f"of the split {name} (`--split` chooses others)" if name else "its name has no split"
            tally.ignored[file.relative_to(folder).as_posix()] = reason
    return records, tally


def load_parquet(files: Sequence[Path]) -> "datasets.Dataset":
    """Parquet files as one data set; their names are no patterns."""
    import datasets

    names = [glob.escape(str(file)) for file in files]
    try:
        return datasets.load_dataset("parquet", data_files=names, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise SciflowError(f"`input_dir`: {files[0]} cannot be read as parquet with images ({error}).") from error


def saved_records(source: str | os.PathLike[str], column: str, split: str | None) -> tuple[list[Record], Tally]:
    """The captioned images of a folder written by `save_to_disk`, or of a data set of the Hub."""
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
    splits = {"": data} if isinstance(data, datasets.Dataset) else dict(data)
    there = [key for key in splits if key]
    chosen = choose_splits(there, split, name) if there else choose_splits([], split, name) or [""]
    records, tally = dataset_records(datasets.concatenate_datasets([splits[key] for key in chosen]), name, column)
    for key in splits.keys() - set(chosen):
        tally.remark("splits not looked at (`--split` chooses others)", f"{key} ({len(splits[key])} rows)")
    return records, tally


def dataset_records(data: "datasets.Dataset", where: str, column: str) -> tuple[list[Record], Tally]:
    """The captioned rows of a data set, each named by the file of its image where these are known and distinct."""
    import datasets

    if "image" not in data.column_names:
        raise SciflowError(f"`input_dir` is {where!r}: it has the columns {data.column_names}, but no `image`.")
    column = caption_column(data.column_names, column, where)
    folder = Path(where) if Path(where).is_dir() else Path(where).parent
    held = data.features["image"]
    data = with_images(data, "image", paths=True)
    if not isinstance(data.features["image"], datasets.Image):
        raise SciflowError(
            f"`input_dir` is {where!r}: its column `image` holds {held}, not images. Those are the bytes of image "
            "files, structs of bytes and path, or paths."
        )
    pictures = ["image"]
    if MASK_COLUMN in data.column_names:
        data = with_images(data, MASK_COLUMN, paths=False)
        pictures += [MASK_COLUMN] if isinstance(data.features[MASK_COLUMN], datasets.Image) else []
    plain = [
        name
        for name, feature in data.features.items()
        if name not in ("image", column) and isinstance(feature, datasets.Value) and feature.dtype not in _BINARY
    ]
    tally = Tally(unit="rows")
    for name in data.column_names:
        if name not in (column, *pictures, *plain):
            tally.remark("columns that are not kept", name)
    images = data.select_columns(pictures)
    rows = data.select_columns([column, *plain]).to_list()
    found = []
    masks: list[Stored | None] = []
    for i, stored in enumerate(images):
        found.append(os.path.basename((stored["image"] or {}).get("path") or ""))
        if MASK_COLUMN in pictures:
            masks.append(_stored_row(images, i, MASK_COLUMN, folder) if stored[MASK_COLUMN] else None)
        else:
            path = rows[i].pop(MASK_COLUMN, None)
            masks.append(stored_file(Path(os.path.normpath(folder / str(path)))) if path else None)
    unique = all(found) and len(set(found)) == len(found)
    records = []
    for i, row in enumerate(rows):
        name = found[i] if unique else f"row_{i:08d}"
        captions = texts_of(row.pop(column), column, f"Row {i} of {where}")
        if not captions:
            tally.skipped[name] = "no caption"
        if len(set(captions)) < len(captions):
            tally.remark("captions that an image has twice, taken once", name)
        for number, caption in enumerate(dict.fromkeys(captions)):
            image = _stored_row(images, i, "image", folder)
            records.append(Record(name, caption, image, row, masks[i], part_name(number)))
    if not records:
        raise SciflowError(f"`input_dir` is {where!r}: no row has a caption in the column {column!r}.")
    return records, tally


def with_images(data: "datasets.Dataset", column: str, *, paths: bool) -> "datasets.Dataset":
    """The data set with `column` as encoded images, also where it was written without the metadata of `datasets`: as
    bytes, as a struct of bytes and path, or (with `paths`) as paths. Left alone if it holds something else.
    """
    import datasets

    feature = data.features[column]
    kind = feature.dtype if isinstance(feature, datasets.Value) else None
    if kind in _BINARY:
        data = data.cast_column(column, datasets.Value("binary"))  # of binary_view there is no cast to an image
    elif not (
        isinstance(feature, datasets.Image)
        or (isinstance(feature, dict) and feature.keys() and feature.keys() <= {"bytes", "path"})
        or (paths and kind in _TEXT)
    ):
        return data
    return data.cast_column(column, datasets.Image(decode=False))


def _stored_row(images: "datasets.Dataset", row: int, column: str, folder: Path) -> Stored:
    """The image of a row; a relative path begins at the table's folder."""
    return Stored(functools.partial(_source, images, row, column, folder))


def _source(images: "datasets.Dataset", row: int, column: str, folder: Path) -> Path | bytes:
    stored = images[row][column] or {}
    if stored.get("bytes"):
        return bytes(stored["bytes"])
    if not stored.get("path"):
        raise OSError("no image in this row")
    return folder / stored["path"] if (folder / stored["path"]).is_file() else Path(stored["path"])
