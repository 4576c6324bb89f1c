"""Captioned images in tables: parquet files, folders written by `save_to_disk`, data sets of the Hub."""

import functools
import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ....errors import SciflowError
from ...row_filter import LEFT_OUT, RowFilter
from ..tally import Tally
from .captions import texts_of
from .edits import EDIT_BOXES, EDIT_MASK, boxes_of, is_none, source_columns, source_paths
from .folder import caption_column
from .pairs import TIE, pair_columns, roles_of
from .record import MASK_COLUMN, Box, Record, Stored, part_name, stored_file
from .splits import choose_splits, split_of_table

if TYPE_CHECKING:
    import datasets

_BINARY = ("binary", "large_binary", "binary_view")
_ROWS_AT_ONCE = 1000
_TEXT = ("string", "large_string", "string_view")


def parquet_records(
    folder: Path,
    files: Sequence[Path],
    column: str,
    split: str | None,
    sources: Sequence[str] = (),
    row_filter: RowFilter | None = None,
) -> tuple[list[Record], Tally]:
    """The captioned images of parquet files in `folder`, of the chosen splits."""
    splits = {file: split_of_table(file.relative_to(folder)) for file in files}
    there = sorted({name for name in splits.values() if name})
    if there and "train" not in there and None in splits.values():  # figures.parquet, figures_test.parquet
        splits, there = {file: name or "train" for file, name in splits.items()}, ["train", *there]
    chosen = choose_splits(there, split, str(folder))
    taken = [file for file, name in splits.items() if not there or name in chosen]
    records, tally = dataset_records(load_parquet(taken), str(folder), column, sources, row_filter)
    tally.used = len(taken)
    for file, name in splits.items():
        if file not in taken:
            reason = f"of the split {name} (`--split` chooses others)" if name else "its name has no split"
            tally.ignored[file.relative_to(folder).as_posix()] = reason
    return records, tally


def names_files(file: Path) -> bool:
    """Whether a file is a parquet table that names image files in `file_name`, as metadata do, and holds no images."""
    import pyarrow.parquet as pq

    if file.suffix != ".parquet":
        return False
    try:
        names = pq.read_schema(file).names
    except (OSError, ValueError):  # told where it is read
        return False
    return "file_name" in names and "image" not in names


def load_parquet(files: Sequence[Path]) -> "datasets.Dataset":
    """Parquet files as one data set; their names are no patterns."""
    import datasets

    names = [glob.escape(str(file)) for file in files]
    try:
        return datasets.load_dataset("parquet", data_files=names, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise SciflowError(f"`input_dir`: {files[0]} cannot be read as parquet with images ({error}).") from error


def saved_records(
    source: str | os.PathLike[str],
    column: str,
    split: str | None,
    sources: Sequence[str] = (),
    row_filter: RowFilter | None = None,
) -> tuple[list[Record], Tally]:
    """The captioned images of a folder written by `save_to_disk`, or of a data set of the Hub."""
    import datasets

    name = os.fspath(source)
    local = Path(name).exists()
    hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))?", name)
    if not local and hub is None:
        raise SciflowError(
            f"`input_dir` is {name!r}, which does not exist. Give a folder of images with captions, a folder "
            "written by `save_to_disk`, parquet files with an `image` column, or a Hub data set (user/name, or "
            "user/name:configuration)."
        )
    try:
        address = [part for part in hub.groups() if part] if hub is not None else [name]
        data = datasets.load_from_disk(name) if local else datasets.load_dataset(*address)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        kind = "cannot be read as a `datasets` folder" if local else "is neither a folder nor a Hub data set in reach"
        raise SciflowError(f"`input_dir` is {name!r}, which {kind} ({error}).") from error
    splits = {"": data} if isinstance(data, datasets.Dataset) else dict(data)
    there = [key for key in splits if key]
    chosen = choose_splits(there, split, name) if there else choose_splits([], split, name) or [""]
    data = datasets.concatenate_datasets([splits[key] for key in chosen])
    records, tally = dataset_records(data, name, column, sources, row_filter)
    for key in splits.keys() - set(chosen):
        tally.remark("splits not looked at (`--split` chooses others)", f"{key} ({len(splits[key])} rows)")
    return records, tally


def dataset_records(
    data: "datasets.Dataset",
    where: str,
    column: str,
    sources: Sequence[str] = (),
    row_filter: RowFilter | None = None,
) -> tuple[list[Record], Tally]:
    """The captioned rows of a data set, each named by the file of its image where these are known and distinct."""
    import datasets

    pair = pair_columns(data.column_names)
    key = "target_image" if "image" not in data.column_names and "target_image" in data.column_names else "image"
    keys = pair or (key,)
    if keys[0] not in data.column_names:
        raise SciflowError(f"`input_dir` is {where!r}: it has the columns {data.column_names}, but no `image`.")
    column = caption_column(data.column_names, column, where)
    sources = source_columns(data.column_names, sources, where)
    folder = Path(where) if Path(where).is_dir() else Path(where).parent
    for key in keys:
        held = data.features[key]
        data = with_images(data, key, paths=True)
        if not isinstance(data.features[key], datasets.Image):
            raise SciflowError(
                f"`input_dir` is {where!r}: its column `{key}` holds {held}, not images. Those are the bytes of image "
                "files, structs of bytes and path, or paths."
            )
    masks = [name for name in (MASK_COLUMN, EDIT_MASK) if name in data.column_names]
    for name in masks:
        data = with_images(data, name, paths=False)
    for name in sources:
        data = with_images(data, name, paths=False)  # paths may be JSON lists of them
    pictures = [*keys, *(name for name in masks if isinstance(data.features[name], datasets.Image)), *sources]
    used = (*keys, column, *masks, *sources)
    plain = [
        name
        for name, feature in data.features.items()
        if name not in used and isinstance(feature, datasets.Value) and feature.dtype not in _BINARY
    ]
    lists = [EDIT_BOXES] if EDIT_BOXES in data.column_names and EDIT_BOXES not in plain else []
    tally = Tally(unit="rows")
    for name in data.column_names:
        if name not in (*used, *plain, *lists):
            tally.remark("columns that are not kept", name)
    names = [] if pair else _file_names(data, keys[0])  # of all rows, so that a filter renames none
    unique = bool(names) and all(names) and len(set(names)) == len(names)
    names = names if unique else [f"row_{i:08d}" for i in range(len(data))]
    kept = np.arange(len(data)) if row_filter is None else kept_rows(data, row_filter, where)
    if len(kept) < len(data):
        tally.remarks[f"rows {LEFT_OUT}"] = [names[i] for i in sorted({*range(len(data))}.difference(kept.tolist()))]
        data = data.select(kept)
    images = data.select_columns(pictures)
    rows = data.select_columns([column, *plain, *lists, *(name for name in masks if name not in pictures)]).to_list()
    cells = _Cells({name: images.select_columns([name]) for name in pictures}, folder)
    refs = list[tuple[list[Stored], list[str]] | str]()
    marked: dict[str, list[Stored | None]] = {name: [] for name in masks}
    looked_into = [name for name in pictures if name in (*masks, *sources)]  # not images: they may be many gigabytes
    others: Any = data.select_columns(looked_into) if looked_into else [{}] * len(rows)
    for i, stored in enumerate(others):
        for name in masks:
            if name in pictures:
                marked[name].append(cells.stored(i, name) if stored[name] else None)
            else:
                path = rows[i].pop(name, None)
                marked[name].append(None if is_none(path) else stored_file(Path(os.path.normpath(folder / str(path)))))
        refs.append(_sources_of(stored, sources, cells, i, f"row_{kept[i]:08d}"))
    records = []
    for i, row in enumerate(rows):
        name = names[kept[i]]
        captions = texts_of(row.pop(column), column, f"Row {kept[i]} of {where}")
        boxes, ref = row.get(EDIT_BOXES), refs[i]
        row = {name: value for name, value in row.items() if name not in lists}
        if not captions:
            tally.skipped[name] = "no caption"
        if len(set(captions)) < len(captions):
            tally.remark("captions that an image has twice, taken once", name)
        try:
            if isinstance(ref, str):
                raise ValueError(ref)
            edit: dict[str, Any] = _edit(*ref, marked[EDIT_MASK][i] if EDIT_MASK in marked else None, boxes)
        except ValueError as error:
            tally.skipped[name] = f"{error}"
            continue
        if not edit and (boxes or any(marked[name][i] for name in marked if name == EDIT_MASK)):
            tally.remark("changed regions of images without a source, not used", name)
        roles = list(roles_of(row, pair, name)) if pair else [(keys[0], row)]
        if not roles:
            tally.skipped[name] = TIE
        mask = marked[MASK_COLUMN][i] if MASK_COLUMN in marked else None
        for number, caption in enumerate(dict.fromkeys(captions)):
            for key, columns in roles:
                image, own = cells.stored(i, key), f"{name}/{key}" if pair else name
                records.append(Record(own, caption, image, columns, mask, part_name(number), **edit))
    if not records:
        first = next((f" First: {name}: {reason}." for name, reason in tally.skipped.items()), "")
        raise SciflowError(f"`input_dir` is {where!r}: no row has a caption in the column {column!r}.{first}")
    return records, tally


def with_images(data: "datasets.Dataset", column: str, *, paths: bool) -> "datasets.Dataset":
    """The data set with `column` as encoded images, also where it was written without the metadata of `datasets`: as
    bytes, as a struct of bytes and path, or (with `paths`) as paths. Nor are the images of lists decoded. Left alone if
    it holds something else.
    """
    import datasets

    feature = data.features[column]
    if isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
        return data.cast_column(column, datasets.List(datasets.Image(decode=False)))
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


@dataclass(frozen=True)
class _Cells:
    """The images in the cells of a table, by column; a relative path begins at the table's folder."""

    columns: "dict[str, datasets.Dataset]"
    folder: Path

    def stored(self, row: int, column: str, number: int | None = None) -> Stored:
        """The image of a cell, or that of this number in its list."""
        return Stored(functools.partial(self._source, row, column, number))

    def _source(self, row: int, column: str, number: int | None) -> Path | bytes:
        cell = self.columns[column][row][column]
        cell = cell if number is None else _listed(cell, column)[number]
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if cell and isinstance(cell, bytes):
            return cell
        if not cell:
            raise OSError("no image in this row")
        return self.folder / cell if (self.folder / cell).is_file() else Path(cell)


def _listed(cell: Any, column: str) -> list[Any]:
    """The images in a cell with sources: one, several, or none; a ValueError where it holds something else."""
    if isinstance(cell, str):
        return source_paths(cell, column)
    cells = cell if isinstance(cell, list) else [] if is_none(cell) else [cell]
    if not all(isinstance(one, str | bytes | dict | None) for one in cells):
        raise ValueError(f"`{column}` is {cell!r:.80}, but must hold images, or lists of images")
    return cells


def kept_rows(data: "datasets.Dataset", row_filter: RowFilter, where: str) -> np.ndarray:
    """Numbers of the rows that a filter keeps."""
    there = [name for name in row_filter.columns if name in data.column_names]
    table: Any = data.select_columns(there).with_format("arrow")[:] if there else None
    mask = row_filter.mask({name: table.column(name) for name in there}, len(data))
    row_filter.close(f"`input_dir` {where!r}", data.column_names)
    return np.flatnonzero(mask)


def _file_names(data: "datasets.Dataset", column: str) -> list[str]:
    """Names of the files that the images of a column were; no bytes of images are read."""
    found: list[str] = []
    for table in data.select_columns([column]).with_format("arrow").iter(_ROWS_AT_ONCE):
        cells = table.column(column)
        cells = pc.struct_field(cells, "path") if pa.types.is_struct(cells.type) else cells
        found += map(_file_name, cells.to_pylist())
    return found


def _file_name(cell: Any) -> str:
    """Name of the file that a cell's image was; "" where it is not known."""
    return os.path.basename(
        (cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else "") or ""
    )


def _sources_of(
    row: Mapping[str, Any], columns: Sequence[str], cells: _Cells, i: int, name: str
) -> tuple[list[Stored], list[str]] | str:
    """The sources of row `i`, which is called `name`, and their names; a text says what is wrong."""
    files, names = [], []
    try:
        for column in columns:
            for number, one in enumerate(_listed(row[column], column)):
                files.append(cells.stored(i, column, number))
                names.append(_file_name(one) or f"{name}/{column}" + (f"_{number}" if number else ""))
    except ValueError as error:
        return str(error)
    return files, names


def _edit(files: list[Stored], names: list[str], mask: Stored | None, boxes: Any) -> dict[str, Any]:
    """Fields of a record that make it an edit; {} without sources."""
    region: Stored | tuple[Box, ...] | None = mask or boxes_of(boxes)
    return {"sources": tuple(files), "source_names": tuple(names), "edit_mask": region} if files else {}
