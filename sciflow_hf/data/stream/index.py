"""The index of a stream: its files, their rows as `datasets` streams them, and caches of a few rows."""

import contextlib
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import fsspec
import numpy as np
import torch

from ...errors import CacheError, first_line
from .. import storage
from ..cache import LatentCache
from ..index import (
    BUILD,
    CAPTION_COLUMNS,
    READERS,
    CacheIndex,
    check_inside,
    check_no_file_twice,
    check_schemas,
    common_metadata,
    file_metadata,
    find_empty_prompt,
    find_root,
    index_files,
    row_shapes,
    wanted_columns,
)
from ..layouts.base import Columns
from ..layouts.inline import InlineReader
from .order import Place, Row

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

FILES_AT_ONCE = 8
_PIECE = 1024  # rows
_INLINE_FILES = 256  # whose offsets are kept
_BECOME_ARRAYS = ("latent_shape", "prompt_embeds_shape", "bucket_h", "bucket_w")
_PathLike = str | os.PathLike[str]
_OnlineText = Callable[[list[str]], dict[str, torch.Tensor]] | None


class _Files(fsspec.AbstractFileSystem):
    """The files of `storage`, for `datasets`: ranges of bytes, tried again and kept on the disk as everywhere.

    Their names are quoted, so that no character of them is part of a pattern.
    """

    protocol = "sciflow-hf"

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return storage.open_file(unquote(path))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {"name": path, "type": "file", "size": None}


fsspec.register_implementation(_Files.protocol, _Files, clobber=True)
_loading = threading.Lock()


@dataclass(frozen=True)
class IndexFile:
    """An index file and what its footer says."""

    name: str
    folder: str  # the entry of `dataset_dir`
    source: int  # its number
    start: int  # number of its first row in the complete index
    rows: int
    schema: "pa.Schema"
    payload: dict[str, Any]
    columns: list[str]  # light ones that are read
    digest: str


class StreamIndex:
    """The index files of one or more caches, of which only the footers are read at once; see `open_stream`.

    Attributes:
        files: in the order of the rows.
        metadata: as of `LatentCache`.
        dtype, online_text: of the caches that `view` makes.
    """

    online_text: _OnlineText = None

    def __init__(
        self, dataset_dir: _PathLike | Sequence[_PathLike], payload_dir: _PathLike | None, dtype: torch.dtype
    ) -> None:
        folders = [os.fspath(f) for f in ([dataset_dir] if isinstance(dataset_dir, str | os.PathLike) else dataset_dir)]
        if not folders:
            raise CacheError("`dataset_dir` is an empty list: name at least one cache.")
        found = [(source, file) for source, folder in enumerate(folders) for file in index_files(folder)]
        names = [file for _, file in found]
        check_no_file_twice(names)
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            footers = list(pool.map(_footer, names))
        schemas = [schema for schema, _, _ in footers]
        check_schemas(names, [source for source, _ in found], schemas)
        described = [file_metadata(name, schema) for name, schema in zip(names, schemas, strict=True)]
        self.metadata = common_metadata(names, described)
        self.files: list[IndexFile] = []
        self.num_rows = 0
        for (source, name), (schema, rows, digest), facts in zip(found, footers, described, strict=True):
            payload = facts.get("payload", {})
            columns, start = wanted_columns(name, schema, facts), self.num_rows
            self.files.append(IndexFile(name, folders[source], source, start, rows, schema, payload, columns, digest))
            self.num_rows += rows
        if not self.num_rows:
            raise CacheError(f"The index {names[0]} holds no samples. {BUILD}.")
        self.num_sources, self.payload_dir, self.dtype = len(folders), payload_dir, dtype
        self._roots: dict[int, str] = {}
        self._inline: dict[int, InlineReader] = {}  # they know where values begin in the files of inline caches

    def number(self, row: Row) -> int:
        """Number of a row in the complete index."""
        return self.files[row.part].start + row.row

    def row(self, number: int) -> Row:
        """The row of that number; reads its file up to there."""
        part = int(np.searchsorted([file.start for file in self.files], number, side="right")) - 1
        return next(row for row, _ in self.read_rows(part, number - self.files[part].start))

    def group(self, row: Row) -> str:
        """As `LatentCache.groups`."""
        values = row.values
        name = values.get("paper_id") or values.get("image_path") or values.get("cache_path")
        return str(name or f"row {self.number(row)}")

    def stream(self, part: int) -> "datasets.IterableDataset":
        """The light columns of index file number `part`, as `datasets` streams them."""
        import datasets
        import pyarrow as pa

        file = self.files[part]
        columns = [*file.columns, *self._caption_column(file)]
        features = datasets.Features.from_arrow_schema(pa.schema([file.schema.field(name) for name in columns]))
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else every call tells a server
        with _loading, tempfile.TemporaryDirectory() as lock_folder:
            return datasets.load_dataset(
                "parquet",
                data_files=f"{_Files.protocol}://{quote(file.name, safe='')}",
                columns=columns,
                features=features,
                batch_size=_PIECE,
                split="train",
                streaming=True,
                cache_dir=lock_folder,
            )

    def read_rows(self, part: int, start: int = 0, place: Place | None = None) -> Iterator[tuple[Row, Place]]:
        """Rows of index file number `part` from row `start` on, each with a place from which it can be read again.

        Args:
            place: of a row that was read before and is not behind `start`; else the file is read from its beginning.

        Raises:
            CacheError: if the file cannot be read, or a row is not what it must be.
        """
        first, state = place or (0, None)
        stream = self.stream(part).with_format("arrow")
        if state is not None:
            stream.load_state_dict(state)
        for table in _tables(stream, self.files[part].name):
            if first + len(table) > start:
                for row in self._rows_of(part, table, first)[max(0, start - first) :]:
                    yield row, (first, state)
            first, state = first + len(table), stream.state_dict()

    def _caption_column(self, file: IndexFile) -> list[str]:
        if self.online_text is None:
            return []
        found = [name for name in CAPTION_COLUMNS if name in file.schema.names][:1]
        if not found:
            raise CacheError(
                f"the index {file.name} has no captions (column `caption` or `text`), which online encoding needs."
            )
        return found

    def _rows_of(self, part: int, table: "pa.Table", first: int) -> list[Row]:
        file = self.files[part]
        columns = Columns(table, file.name, file.start + first)
        self._check_paths(part, table, first)
        latents, texts, sizes = (shapes.tolist() for shapes in row_shapes(columns))
        others = table.drop_columns([name for name in _BECOME_ARRAYS if name in table.column_names]).to_pylist()
        return [
            Row(part, first + i, tuple(size), tuple(latent), tuple(text), values)
            for i, (size, latent, text, values) in enumerate(zip(sizes, latents, texts, others, strict=True))
        ]

    def _check_paths(self, part: int, table: "pa.Table", first: int) -> None:
        file = self.files[part]
        columns = Columns(table, file.name, file.start + first)
        if part not in self._roots:
            root = file.name.rpartition("/")[0] or "."
            if not _holds_payload(file):
                root = find_root(columns, file.folder, self.payload_dir)
            self._roots[part] = root
        for name in table.column_names:
            if name.endswith("_path") and name != "image_path":
                check_inside(columns, [self._roots[part]], name)

    def view(self, rows: Sequence[Row]) -> "RowsView":
        """A cache of some rows, in the given order; row numbers in its messages are those of the complete index."""
        import pyarrow as pa

        order = sorted(range(len(rows)), key=lambda i: rows[i].part)
        parts = sorted({row.part for row in rows})
        of_part = [[rows[i] for i in order if rows[i].part == part] for part in parts]
        tables = [self._table(part, own) for part, own in zip(parts, of_part, strict=True)]
        latents = [np.array([row.latent_shape for row in own], dtype=np.int32) for own in of_part]
        texts = [np.array([row.text_shape for row in own], dtype=np.int32) for own in of_part]
        made = [self._part(*each) for each in zip(parts, of_part, tables, latents, texts, strict=True)]
        starts = np.cumsum([0, *(self.files[part].rows for part in parts)])
        index = _SomeRows(
            table=pa.concat_tables(tables, promote_options="permissive"),
            readers=made,
            starts=np.cumsum([0, *map(len, of_part)]),
            sources=np.array([self.files[part].source for part in parts], dtype=np.int32),
            latent_shapes=np.concatenate(latents),
            text_shapes=np.concatenate(texts),
            sizes=np.array([rows[i].size for i in order], dtype=np.int32),
            metadata=self.metadata,
            empty_prompt_file=self._empty_prompt_file,
            numbers=[self.number(rows[i]) for i in order],
            taken=np.array([start + row.row for start, own in zip(starts, of_part, strict=False) for row in own]),
        )
        view = RowsView(index, dtype=self.dtype, rows=np.argsort(order, kind="stable"))
        view.online_text = self.online_text
        return view

    def _table(self, part: int, rows: Sequence[Row]) -> "pa.Table":
        import pyarrow as pa

        file = self.files[part]
        names = [n for n in (*file.columns, *self._caption_column(file)) if n not in _BECOME_ARRAYS]
        return pa.Table.from_pylist([row.values for row in rows], pa.schema([file.schema.field(n) for n in names]))

    def _part(self, part: int, rows: Sequence[Row], table: "pa.Table", latents: np.ndarray, texts: np.ndarray) -> Any:
        import pyarrow as pa

        file, root = self.files[part], self._root(part)
        layout = file.payload.get("layout", "npz")
        if _holds_payload(file):
            own = [file.name.rpartition("/")[2]] * len(rows)
            table = table.append_column("cache_path", pa.array(own, pa.string()))
            table = table.append_column("inline_row", pa.array([row.row for row in rows], pa.int64()))
        made = READERS[layout](file.name, root, table, file.payload, latents, texts)
        if isinstance(made, InlineReader):  # where values begin is looked up once per data file, not once per view
            made.share(self._inline.setdefault(part, made))
            if len(self._inline) > _INLINE_FILES:
                self._inline.pop(next(iter(self._inline)))
        return made

    def _root(self, part: int) -> str:
        """Where the paths of an index file are rooted."""
        if part not in self._roots:  # its rows are those of a saved stream
            next(self.read_rows(part), None)
        return self._roots[part]

    @cached_property
    def _empty_prompt_file(self) -> str | None:
        return find_empty_prompt([*self._roots.values(), *(file.folder for file in self.files)])


@dataclass(frozen=True)
class _SomeRows(CacheIndex):
    """`numbers`: of its rows in the complete index. `taken`: where they are in the joined files."""

    numbers: list[int] = field(default_factory=list)
    taken: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def read_columns(self, names: Sequence[str] | None = None) -> "pa.Table":
        import pyarrow as pa

        return super().read_columns(names).take(pa.array(self.taken))

    @cached_property
    def row_ids(self) -> list[str]:
        ids = enumerate(zip(super().row_ids, self.numbers, strict=True))
        return [f"row {number}" if name == f"row {i}" else name for i, (name, number) in ids]


class RowsView(LatentCache):
    """Some rows of a stream."""

    _index: _SomeRows

    @property
    def row_numbers(self) -> list[int]:
        """Of each row, in the complete index."""
        return [self._index.numbers[row] for row in self._rows.tolist()]

    def describe(self, i: int) -> str:
        return re.sub(r"^row \d+", f"row {self.row_numbers[i]}", super().describe(i))


def _holds_payload(file: IndexFile) -> bool:
    return file.payload.get("layout") == "inline" and "inline_row" not in file.columns


def _tables(stream: "datasets.IterableDataset", file: str) -> Iterator["pa.Table"]:
    import pyarrow as pa

    try:
        yield from stream.iter(_PIECE)
    except CacheError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CacheError(f"The index {file} cannot be read as parquet ({first_line(error)}). {BUILD}.") from error


@contextlib.contextmanager
def _parquet(file: str) -> Iterator["pq.ParquetFile"]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with storage.open_file(file) as handle, pq.ParquetFile(handle) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise CacheError(f"The index {file} cannot be read as parquet ({first_line(error)}). {BUILD}.") from error


def _footer(file: str) -> tuple["pa.Schema", int, str]:
    """Schema, number of rows, and a digest of how rows lie in the file."""
    with _parquet(file) as parquet:
        facts = parquet.metadata
        groups = [
            (facts.row_group(i).num_rows, facts.row_group(i).total_byte_size) for i in range(facts.num_row_groups)
        ]
        return parquet.schema_arrow, facts.num_rows, hashlib.sha256(repr(groups).encode()).hexdigest()
