"""Inline: tensors in binary columns of parquet files, which stream from anywhere, and are read by their byte offset."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ...errors import CacheError, first_line
from .. import storage
from ..parquet import Columns
from ..writing import output_file
from .members import BROKEN, Stored, missing_file, unreadable
from .stored import StoredPart, numbers, stored_columns, with_scales

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROW_GROUP_BYTES = 64 << 20
_ROW_GROUP_ROWS = 10_000  # parquet's writer begins a new page after 20,000
_PAGE = 2**31 - 1  # bytes; the format's limit
_LONGEST_PAGE_HEADER = 256  # bytes; without statistics about 30
_PREFIX = 4  # bytes; length of each value


class InlinePart(StoredPart):
    """The rows of one index file whose payloads lie in parquet files; see `StoredPart`.

    They are the rows of the index file itself, unless columns `cache_path` and `inline_row` name others.
    """

    def __init__(
        self,
        file: str,
        root: str,
        table: "pa.Table",
        payload: Mapping[str, Any],
        latent_shapes: np.ndarray,
        text_shapes: np.ndarray,
    ) -> None:
        super().__init__(file, root, table, payload, latent_shapes, text_shapes)
        self._files_of_rows: tuple[list[str], np.ndarray] | None = None
        if "inline_row" in table.column_names:
            columns = Columns(table, file, 0)
            self._files_of_rows = self._files(columns, "cache_path")
            self._rows = numbers(columns, "inline_row")
        self._offsets: dict[str, dict[str, np.ndarray]] = {}
        self._checked: set[tuple[str, str]] = set()

    def _place(self, name: str, i: int, nbytes: int, where: str) -> tuple[str, int]:
        file, row = self.file, i
        if self._files_of_rows is not None:
            files, number = self._files_of_rows
            file, row = files[number[i]], int(self._rows[i])
        try:
            if file not in self._offsets:
                self._offsets[file] = value_offsets(file, list(self.tensors))
            offsets = self._offsets[file][name]
            if row >= len(offsets):
                raise ValueError(f"it has {len(offsets)} rows, but the index refers to its row {row}")
            self._check_length(file, name, int(offsets[row]), nbytes)
        except FileNotFoundError as error:
            raise missing_file(file, where) from error
        except BROKEN as error:
            raise unreadable(file, where, str(error), name) from error
        return file, int(offsets[row])

    def _check_length(self, file: str, name: str, offset: int, nbytes: int) -> None:
        """The length that stands before each value. Of a remote file only the first that is read: it is a request."""
        if storage.is_url(file) and (file, name) in self._checked:
            return
        found = int.from_bytes(storage.read(file, offset - _PREFIX, _PREFIX), "little")
        if found != nbytes:
            raise ValueError(f"a value of {found} bytes where the index says {nbytes}")
        self._checked.add((file, name))


def value_offsets(file: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Where in a parquet file the bytes of each row's value begin, for some of its binary columns: (N,) int64.

    Parquet says only where a row group's values end; the rest follows from their lengths.

    Raises:
        ValueError: if the file is not parquet, or these columns are not in one plain page per row group.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with storage.open_file(file) as handle, pq.ParquetFile(handle) as parquet:
            metadata = parquet.metadata
            lengths = parquet.read([f"{name}_nbytes" for name in names])
            sizes = {name: lengths.column(f"{name}_nbytes").to_numpy() for name in names}
    except pa.ArrowException as error:
        raise ValueError(first_line(error)) from error
    offsets = {name: np.empty(len(lengths), dtype=np.int64) for name in names}
    start = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = {(chunk := group.column(i)).path_in_schema: chunk for i in range(group.num_columns)}
        rows = slice(start, start + group.num_rows)
        for name in names:
            offsets[name][rows] = _offsets_in_chunk(chunks[name], _PREFIX + sizes[name][rows])
        start += group.num_rows
    return offsets


def count_rows(file: str) -> int:
    """Rows of an inline file. CacheError if it is missing or cut short."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with storage.open_file(file) as handle:
            return int(pq.read_metadata(handle).num_rows)
    except FileNotFoundError as error:
        raise missing_file(file, "an inline file") from error
    except (pa.ArrowException, *BROKEN) as error:
        raise unreadable(file, "an inline file", first_line(error)) from error


def _offsets_in_chunk(chunk: "pq.ColumnChunkMetaData", sizes: np.ndarray) -> np.ndarray:
    header = chunk.total_compressed_size - int(sizes.sum())
    plain = chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page
    if not plain or not 0 < header <= _LONGEST_PAGE_HEADER:
        raise ValueError(f"column `{chunk.path_in_schema}` is not one plain page per row group")
    end = chunk.data_page_offset + chunk.total_compressed_size
    return end - np.cumsum(sizes[::-1])[::-1] + _PREFIX


def write_inline(file: Path, rows: "pa.Table", samples: Iterable[Mapping[str, Stored]], codec: str, facts: Any) -> None:
    """Writes rows and their tensors as one parquet file, row group by row group.

    Args:
        file: appears complete or not at all.
        rows: the light columns.
        samples: tensors of each row by name, the same names in every row.
        codec: of all tensors.
        facts: (tensors) -> schema metadata, where tensors says what each is stored as.
    """
    import pyarrow.parquet as pq

    def write(handle: BinaryIO) -> None:
        writer: pq.ParquetWriter | None = None
        group: list[Mapping[str, Stored]] = []
        done = size = 0
        try:
            for following, sample in zip(range(1, rows.num_rows + 1), samples, strict=True):
                group.append(sample)
                size += sum(memoryview(stored.data).nbytes for stored in sample.values())
                room = size + size // len(group) <= ROW_GROUP_BYTES and len(group) < _ROW_GROUP_ROWS
                if room and following < rows.num_rows:
                    continue
                table = _group_table(rows.slice(done, len(group)), group)
                if writer is None:
                    kinds = {name: {"dtype": stored.dtype, "codec": codec} for name, stored in sample.items()}
                    table = table.replace_schema_metadata(facts(with_scales(kinds)))
                    writer = _open_writer(handle, table, list(sample))
                writer.write_table(table, row_group_size=len(group))
                done, size, group = following, 0, []
        finally:
            if writer is not None:
                writer.close()

    with output_file(file) as handle:
        write(handle)


def _group_table(rows: "pa.Table", samples: Sequence[Mapping[str, Stored]]) -> "pa.Table":
    import pyarrow as pa

    names = list(samples[0])
    for sample in samples:
        if sample.keys() != samples[0].keys():
            raise CacheError(f"Some samples hold {names}, others {list(sample)}: all must hold the same tensors.")
    for name in names:
        values = [memoryview(sample[name].data) for sample in samples]
        found = [(s[name].shape, v.nbytes, zlib.crc32(v)) for s, v in zip(samples, values, strict=True)]
        for column, array in stored_columns(name, found).items():
            rows = rows.append_column(pa.field(column, array.type), array)
    for name in names:
        sizes = [memoryview(sample[name].data).nbytes for sample in samples]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        data = np.concatenate([np.frombuffer(sample[name].data, dtype=np.uint8) for sample in samples])
        array = pa.Array.from_buffers(pa.binary(), len(samples), [None, pa.py_buffer(offsets), pa.py_buffer(data)])
        rows = rows.append_column(pa.field(name, pa.binary(), nullable=False), array)
    return rows


def _open_writer(handle: BinaryIO, table: "pa.Table", payload: Sequence[str]) -> "pq.ParquetWriter":
    import pyarrow.parquet as pq

    light = [name for name in table.column_names if name not in payload]
    return pq.ParquetWriter(
        handle,
        table.schema,
        compression=dict.fromkeys(light, "snappy") | dict.fromkeys(payload, "none"),
        use_dictionary=light,
        write_statistics=light,
        column_encoding=dict.fromkeys(payload, "PLAIN"),
        data_page_size=_PAGE,
    )
