"""Prompts to draw images of: a text file, a table, or a data set."""

import csv
import json
import math
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

from ..errors import SciflowError, first_line
from .build.sources.captions import read_text

PROMPT_COLUMNS = ("prompt", "caption", "text")
_NUMBERS = ("width", "height", "seed")
_HOW = (
    "Give a .txt file with a prompt a line, a .jsonl, .csv or .parquet file with a column `prompt`, or a data set of "
    "the Hub (user/name, or user/name:configuration)."
)


def read_prompts(source: str, *, split: str | None = None, option: str = "prompts_file") -> list[dict[str, Any]]:
    """The prompts of a file or data set, a dict each.

    Args:
        source: a file (.txt with a prompt a line, .jsonl, .csv, .parquet), a folder written by
            `datasets.Dataset.save_to_disk`, or a Hub data set (user/name, or user/name:configuration).
        split: of a data set that has several.
        option: which holds `source`, for messages.

    Returns:
        Of each row `prompt`, from the first column there is of `prompt`, `caption` and `text`; where the table has
        them and the row's field is not empty `width`, `height` and `seed` (int), and `source_images` (list of paths,
        relative ones below the file's folder; from a column `source_image` if there is none); and the other columns as
        they are.

    Raises:
        SciflowError: nothing there, no column with prompts, a row without one, or a number that is none.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".txt":
        rows: list[dict[str, Any]] = [{"prompt": line} for line in _text(path).splitlines() if line.strip()]
    elif path.is_file() and path.suffix in _READERS:
        rows = list(_READERS[path.suffix](path))
    elif path.is_file():
        raise SciflowError(f"`{option}` {source!r}: {path.suffix or 'no suffix'} is not read. {_HOW}")
    else:
        rows = _dataset(source, split, option)
        split = None
    if split is not None:
        raise SciflowError(f"`split` {split!r} is for data sets; `{option}` {source!r} is a file. Leave it out.")
    if not rows:
        raise SciflowError(f"`{option}` {source!r} holds no prompts.")
    columns = dict.fromkeys(name for row in rows for name in row)
    column = next((name for name in PROMPT_COLUMNS if name in columns), None)
    if column is None:
        raise SciflowError(
            f"`{option}` {source!r} has the columns {', '.join(map(repr, columns))}, but none called "
            f"{', '.join(PROMPT_COLUMNS)}. Rename the one that holds the prompts."
        )
    return [_row(row, column, f"`{option}` {source!r}, row {i}", path.parent) for i, row in enumerate(rows)]


def _row(row: dict[str, Any], column: str, where: str, folder: Path) -> dict[str, Any]:
    row = {name: value for name, value in row.items() if not _is_empty(value)}
    prompt = row.pop(column, None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise SciflowError(f"{where}: `{column}` is {prompt!r:.60}, but must be a text.")
    for name in _NUMBERS:
        if name in row:
            row[name] = _integer(row[name], f"{where}: `{name}`")
    if "source_images" not in row and isinstance(row.get("source_image"), str | list):  # as training data have it
        row["source_images"] = row.pop("source_image")
    if isinstance(named := row.get("source_images"), str):
        named = json.loads(named) if named.lstrip().startswith("[") else [file.strip() for file in named.split(",")]
        row["source_images"] = named
    if isinstance(named, list) and all(isinstance(file, str) for file in named):
        row["source_images"] = [str(folder / file) for file in named]
    return {"prompt": prompt.strip()} | row


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or value == ""


def _integer(value: Any, where: str) -> int:
    try:
        if float(value) == int(float(value)):
            return int(value) if isinstance(value, int) or str(value).lstrip("+-").isdigit() else int(float(value))
    except (TypeError, ValueError, OverflowError):
        pass
    raise SciflowError(f"{where} is {value!r:.60}, but must be an integer.")


def _text(file: Path) -> str:
    try:
        return read_text(file)[0]
    except (OSError, ValueError) as error:
        raise SciflowError(f"{file} cannot be read as text ({first_line(error)}).") from error


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SciflowError(f"Line {number} of {file} is not JSON ({error}). Mend that line.") from error
            if not isinstance(row, dict):
                raise SciflowError(f'Line {number} of {file} is {row!r:.60}, but must be such as {{"prompt": "..."}}.')
            yield row


def _csv_rows(file: Path) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(StringIO(_text(file), newline=""), skipinitialspace=True, strict=True)
    try:
        for row in reader:
            if None in row:
                raise SciflowError(
                    f"Line {reader.line_num} of {file} has more fields than the first line names columns. Put texts "
                    "with commas into double quotes."
                )
            yield row
    except csv.Error as error:
        raise SciflowError(f"Line {reader.line_num} of {file} cannot be read ({error}).") from error


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    try:
        yield from pq.ParquetFile(file).read().to_pylist()
    except (OSError, ValueError) as error:
        raise SciflowError(f"{file} cannot be read as parquet ({first_line(error)}).") from error


_READERS = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _dataset(source: str, split: str | None, option: str) -> list[dict[str, Any]]:
    """The rows of a data set; images in it stay encoded."""
    import datasets

    local = Path(source).is_dir()
    hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))?", source)
    if not local and hub is None:
        raise SciflowError(f"`{option}` {source!r}: there is no such file. {_HOW}")
    try:
        address = [part for part in hub.groups() if part] if hub is not None else []
        found = datasets.load_from_disk(source) if local else datasets.load_dataset(*address)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        kind = "cannot be read as a `datasets` folder" if local else "is neither a file nor a Hub data set in reach"
        raise SciflowError(f"`{option}` {source!r} {kind} ({first_line(error)}). {_HOW}") from error
    splits = {"": found} if isinstance(found, datasets.Dataset) else dict(found)
    if (split or "") not in splits and (split is not None or len(splits) > 1):
        named = f"`split` {split!r}: " if split else ""
        there = f"the splits {', '.join(splits)}" if "" not in splits else "no splits"
        raise SciflowError(f"{named}`{option}` {source!r} has {there}. Choose one by `--split`.")
    data = splits[split] if split else next(iter(splits.values()))
    pictures = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
    for name in pictures:
        data = data.cast_column(name, datasets.Image(decode=False))
    rows: list[dict[str, Any]] = data.to_list()
    return rows
