"""Tables of candidates, a row an image: `metadata.jsonl` of `prefer draw`, or any jsonl, csv or parquet file."""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import SciflowError, first_line
from ..files import atomic_file
from .build.sources.captions import METADATA_FILES, read_notes

SUFFIXES = (".jsonl", ".csv", ".parquet")
_PATHS = ("latents_file", "source_image", "reference")  # columns that may name further files
CAPTIONS = ("caption", "prompt", "text")


@dataclass(frozen=True)
class Candidates:
    """The rows of a table of candidates.

    Attributes:
        file: the table.
        rows: its columns.
        key: the column with the images' names, relative to the table's folder.
        caption: the column with the prompts.
        schema: of a parquet file.
    """

    file: Path
    rows: list[dict[str, Any]]
    key: str
    caption: str
    schema: Any = None

    def image(self, row: int) -> Path:
        """The file of a row's image."""
        return self.file.parent / self.rows[row][self.key]

    def with_columns(self, columns: Mapping[str, Sequence[Any]]) -> "Candidates":
        """The table with further columns of numbers or None, which replace those of these names."""
        added = [{name: column[i] for name, column in columns.items()} for i in range(len(self.rows))]
        return replace(self, rows=[row | new for row, new in zip(self.rows, added, strict=True)])

    def write(self, file: Path, numbers: Sequence[str]) -> None:
        """Writes the table; names of images, latents and sources become relative to the folder of `file`.

        Args:
            file: .jsonl, .csv or .parquet.
            numbers: names of float columns, for parquet.

        Raises:
            SciflowError: a column of bytes, in another format than parquet.
        """
        rows, paths = self.rows, (self.key, *_PATHS)
        if file.parent.resolve() != self.file.parent.resolve():
            rows = [r | {name: self._moved(r[name], file.parent) for name in paths if name in r} for r in rows]
        if file.suffix != ".parquet" and (held := [n for row in rows for n, v in row.items() if isinstance(v, bytes)]):
            raise SciflowError(
                f"The column {held[0]!r} of {self.file} holds bytes: write the table to a .parquet file."
            )
        with atomic_file(file) as temporary:
            if file.suffix == ".parquet":
                self._write_parquet(temporary, rows, numbers)
            elif file.suffix == ".csv":
                with temporary.open("w", encoding="utf-8", newline="") as text:
                    writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row))
                    writer.writeheader()
                    writer.writerows({n: _cell(value) for n, value in row.items()} for row in rows)
            else:
                lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
                temporary.write_text("".join(lines), encoding="utf-8")

    def _moved(self, path: Any, folder: Path) -> Any:
        """A path, or a list of them, relative to another folder."""
        if isinstance(path, list):
            return [self._moved(one, folder) for one in path]
        if not isinstance(path, str) or not (self.file.parent / path).is_file():
            return path
        return Path(os.path.relpath(self.file.parent / path, folder)).as_posix()

    def _write_parquet(self, file: Path, rows: list[dict[str, Any]], numbers: Sequence[str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        known = pa.Table.from_pylist([{n: v for n, v in row.items() if n not in numbers} for row in rows]).schema
        kept = [field for field in self.schema or known if field.name not in numbers]
        metadata = None if self.schema is None else self.schema.metadata
        schema = pa.schema([*kept, *(pa.field(name, pa.float64()) for name in numbers)], metadata)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)


def read_candidates(*, input_dir: str | None = None, table: str | None = None) -> Candidates:
    """A table of candidates.

    Args:
        input_dir: folder of images with metadata.jsonl, metadata.csv or metadata.parquet.
        table: a table itself.

    Raises:
        SciflowError: none or both are given; a file that is not there or cannot be read; a row without the name of an
            image or without a prompt; an image that is not there.
    """
    if (input_dir is None) == (table is None):
        raise SciflowError("give either `--input_dir`, a folder of images with a metadata.jsonl, or `--table`.")
    if input_dir is not None:
        found = [Path(input_dir, name) for name in METADATA_FILES if Path(input_dir, name).is_file()]
        if len(found) != 1:
            held = f"has {', '.join(file.name for file in found)}" if found else "has none of these"
            raise SciflowError(
                f"`input_dir` {input_dir!r} must hold one of {', '.join(METADATA_FILES)}, but {held}. Name one by "
                "`--table`, or draw candidates with `sciflow-hf prefer draw`."
            )
        file = found[0]
    else:
        file = Path(table or "")
    if not file.is_file() or file.suffix not in SUFFIXES:
        why = f"is no {', '.join(SUFFIXES)} file" if file.exists() else "is not there"
        raise SciflowError(f"`table` {str(file)!r} {why}. Give a table with columns such as file_name and caption.")
    return _checked(file)


def _checked(file: Path) -> Candidates:
    schema, rows = None, []
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            read = pq.ParquetFile(file).read()
        except (OSError, ValueError) as error:
            raise SciflowError(f"{file} cannot be read as parquet ({first_line(error)}).") from error
        schema, rows = read.schema, read.to_pylist()
    notes = read_notes(file)[0]
    rows = rows or [{note.key: note.name} | note.columns for note in notes]
    if not notes:
        raise SciflowError(f"{file} holds no rows.")
    names = {note.key for note in notes}
    caption = next((name for name in CAPTIONS if any(name in row for row in rows)), None)
    if len(names) > 1 or caption is None:
        what = f"images in the columns {', '.join(sorted(names))}" if caption else f"none of {', '.join(CAPTIONS)}"
        raise SciflowError(f"{file} has {what}. Name the images in `file_name` and the prompts in `caption`.")
    for note in notes:
        prompt = note.columns.get(caption)
        if not isinstance(prompt, str) or not prompt.strip():
            raise SciflowError(f"{note.where} ({note.name}): `{caption}` is {prompt!r:.60}, but must be a text.")
        if not (file.parent / note.name).is_file():
            missing = f"{note.where} names {note.name}, which is not in {file.parent}."
            raise SciflowError(f"{missing} Draw it again, or remove the row.")
    return Candidates(file, rows, names.pop(), caption, schema)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
