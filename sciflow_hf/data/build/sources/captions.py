"""Captions as people write them: the encodings of texts, the rows of metadata files, one text or several an image."""

import codecs
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ....errors import SciflowError, first_line

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
WINDOWS = "cp1252"
_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SEPARATORS = ",;\t|"
_NAMES = ("file_name", "target_image", "target_image_path", "image_path")  # columns that name a row's image


@dataclass(frozen=True)
class Note:
    """One row of a metadata file.

    Attributes:
        where: where it stands.
        columns: its fields, but that with the name.
        name: of its image, as it stands there.
        key: the column with the name.
        folder: of the metadata file.
    """

    where: str
    columns: dict[str, Any]
    name: str = ""
    key: str = "file_name"
    folder: Path = Path()


def read_text(file: Path) -> tuple[str, str]:
    """The text of a file and its encoding: what its byte order mark says, else UTF-8, else Windows-1252.

    Raises:
        ValueError: it is none of them; OSError: it cannot be read.
    """
    data = file.read_bytes()
    encoding = next((name for mark, name in _BOMS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        if encoding != "utf-8":
            raise
        encoding = WINDOWS
        text = data.decode(encoding)  # five bytes mean nothing in it
    if "\0" in text:
        raise ValueError("it holds zero bytes, as UTF-16 without a byte order mark and what is no text do")
    return text, encoding


def texts_of(value: Any, column: str, where: str) -> list[str]:
    """The captions in a field: one text, a list of texts, or none.

    Raises:
        SciflowError: for anything else; says `where`.
    """
    found = []
    for text in value if isinstance(value, list | tuple) else [value]:
        if text is None or text != text:  # NaN, as pandas writes what is not there
            continue
        if not isinstance(text, str):
            raise SciflowError(
                f"{where}: `{column}` is {value!r}, but a caption is a text, or a list of texts, one for each sample."
            )
        found.append(text.strip())
    return [text for text in found if text]


def read_notes(file: Path) -> tuple[list[Note], str]:
    """Rows of a metadata file, and its encoding.

    Raises:
        SciflowError: a file or row that cannot be understood; names it.
    """
    if file.suffix == ".parquet":
        return _with_file_name(file, _table_rows(file)), "utf-8"
    try:
        text, encoding = read_text(file)
    except ValueError as error:
        raise SciflowError(f"{file} cannot be read as text ({first_line(error)}). Save it in UTF-8.") from error
    rows = _csv_rows(file, text) if file.suffix == ".csv" else _json_rows(file, text)
    return _with_file_name(file, rows), encoding


def _with_file_name(file: Path, rows: Iterator[tuple[str, Any]]) -> list[Note]:
    notes = []
    for where, row in rows:
        key = next((key for key in _NAMES if isinstance(row, dict) and row.get(key)), "file_name")
        name = row.get(key) if isinstance(row, dict) else None
        if not isinstance(name, str) or not name.strip():
            held = f"the columns {', '.join(map(repr, row))}" if isinstance(row, dict) else f"{row!r:.60}"
            raise SciflowError(
                f"{where} has no `file_name`, but {held}. It must name an image relative to {file.name}."
            )
        notes.append(Note(where, {k: v for k, v in row.items() if k != key}, name, key, file.parent))
    return notes


def _json_rows(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"Line {number} of {file}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SciflowError(f"Line {number} of {file} is not JSON ({error}). Mend that line.") from error


def _table_rows(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file).read()
    except (OSError, ValueError) as error:
        raise SciflowError(f"{file} cannot be read as parquet ({first_line(error)}).") from error
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    plain = [field.name for field in table.schema if not any(is_kind(field.type) for is_kind in binary)]
    for number, row in enumerate(table.select(plain).to_pylist()):
        yield f"Row {number} of {file}", row


def _csv_rows(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Rows of a CSV file, separated as its first line is."""
    reader, header = _csv_reader(file, text)
    while True:
        where = f"Line {reader.line_num + 1} of {file}"  # where the row begins: quoted texts have several lines
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise SciflowError(f"{where} cannot be read ({error}). Double the quotes within a quoted text.") from error
        if fields is None:
            return
        if len(fields) > len(header) and any(field.strip() for field in fields[len(header) :]):
            raise SciflowError(
                f"{where} has {len(fields)} fields, but the first line names {len(header)} columns "
                f"({', '.join(header)}). Put texts with {reader.dialect.delimiter!r} into double quotes."
            )
        if any(field.strip() for field in fields):
            yield where, {name: field or None for name, field in zip(header, fields, strict=False) if name}


def _csv_reader(file: Path, text: str) -> tuple[Any, Sequence[str]]:
    for separator in _SEPARATORS:
        reader = csv.reader(StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
        except csv.Error:
            continue
        if not {*_NAMES}.isdisjoint(header) and (len(header) > 1 or separator == _SEPARATORS[-1]):
            return reader, header
    first = text.partition("\n")[0].strip()
    raise SciflowError(
        f"Line 1 of {file} has no `file_name` among its columns, but {first!r:.100}. Name the columns there, such as "
        "file_name,caption."
    )
