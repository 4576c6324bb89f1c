"""Inline: tensors in binary columns of parquet files, which stream from anywhere, and are read by their byte offset."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...diffusion.sources import source_name, source_names_in
from ...errors import CacheError, first_line
from .. import storage
from ..writing import output_file
from .base import Block, ColumnReader, Columns, Encoded, Sample, Writer, explain, light

ROW_GROUP_BYTES = 64 << 20
_ROW_GROUP_ROWS = 10_000  # parquet's writer begins a new page after 20,000
_PAGE = 2**31 - 1  # bytes; the format's limit
_LONGEST_PAGE_HEADER = 256  # bytes; without statistics about 30
_PREFIX = 4  # bytes; length of each value


# -- reading ---------------------------------------------------------------------------------------------------


class InlineReader(ColumnReader):
    """Rows whose payloads lie in parquet files.

    They are the rows of the index file itself, unless columns `cache_path` and `inline_row` name others.
    """

    def __init__(self, columns: Columns, root: str, payload: Mapping[str, Any], *shapes: np.ndarray) -> None:
        super().__init__(columns, root, payload, *shapes)
        self._offsets: dict[str, dict[str, np.ndarray]] = {}  # of each file, by tensor: where a row's value begins
        self._elsewhere = "inline_row" in columns.names
        if self._elsewhere:
            self._files, self._number = columns.files("cache_path", root)
            self._rows = columns.numbers("inline_row")
        self._checked: set[tuple[str, str]] = set()

    def share(self, other: "InlineReader") -> None:
        """From now on, two readers of the same files know together what each finds out about them."""
        self._offsets, self._checked = other._offsets, other._checked

    def _row(self, i: int) -> tuple[str, int]:
        """Parquet file, and the row there."""
        return (self._files[self._number[i]], int(self._rows[i])) if self._elsewhere else (self.file, i)

    def _find(self, name: str, i: int, nbytes: int, where: object) -> tuple[str, int]:
        file, row = self._row(i)
        with explain(file, where, name):
            if file not in self._offsets:
                self._offsets[file] = value_offsets(file, list(self.tensors))
            offsets = self._offsets[file][name]
            if row >= len(offsets):
                raise ValueError(f"it has {len(offsets)} rows, but the index refers to its row {row}")
            offset = int(offsets[row])
            # The length that stands before each value; of a remote file only the first that is read: it is a request.
            if not (storage.is_url(file) and (file, name) in self._checked):
                found = int.from_bytes(storage.read(file, offset - _PREFIX, _PREFIX), "little")
                if found != nbytes:
                    raise ValueError(f"a value of {found} bytes where the index says {nbytes}")
                self._checked.add((file, name))
        return file, offset

    def places(self, name: str) -> dict[tuple[str, int], int]:
        column, columns = list(self.tensors).index(name), len(self.tensors)
        found = ((*self._row(i), nbytes) for i, nbytes in enumerate(self._nbytes[name].tolist()) if nbytes)
        return {(file, row * columns + column): nbytes for file, row, nbytes in found}


def value_offsets(file: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Where in a parquet file the bytes of each row's value begin, for some of its binary columns: (N,) int64.

    Parquet says only where a row group's values end; the rest follows from their lengths.

    Raises:
        ValueError: if the file is not parquet, or these columns are not in one plain page per row group.
    """
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


def _offsets_in_chunk(chunk: pq.ColumnChunkMetaData, sizes: np.ndarray) -> np.ndarray:
    header = chunk.total_compressed_size - int(sizes.sum())
    plain = chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page
    if not plain or not 0 < header <= _LONGEST_PAGE_HEADER:
        raise ValueError(f"column `{chunk.path_in_schema}` is not one plain page per row group")
    end = chunk.data_page_offset + chunk.total_compressed_size
    return end - np.cumsum(sizes[::-1])[::-1] + _PREFIX


# -- writing ---------------------------------------------------------------------------------------------------


class InlineWriter(Writer):
    """`data_<block>.parquet`, index and payload in one, row group by row group."""

    payload = "inline"

    def has_payload(self, block: Block) -> bool:
        file = self.output / block.index_file
        if not file.is_file():
            return False
        with explain(str(file), "an inline file"):
            return int(pq.read_metadata(file).num_rows) == block.rows.num_rows

    def is_ready(self, block: Block) -> bool:
        return False

    def write_index(self, block: Block) -> None:
        """Nothing: the payload is its own index."""

    def write_payload(self, block: Block, samples: Iterable[Sample]) -> None:
        rows, parquet = block.rows, None
        group: list[Mapping[str, Encoded]] = []
        done = size = 0
        with output_file(self.output / block.index_file) as handle:
            try:
                for following, sample in zip(range(1, rows.num_rows + 1), samples, strict=True):
                    group.append(self.layout.encode(sample))
                    size += sum(encoded.nbytes for encoded in group[-1].values())
                    room = size + size // len(group) <= ROW_GROUP_BYTES and len(group) < _ROW_GROUP_ROWS
                    if room and following < rows.num_rows:
                        continue
                    table = self._table(rows.slice(done, len(group)), group)
                    if parquet is None:
                        stored = self._complete(group[0])
                        kinds = {n: {"dtype": e.dtype, "codec": self.layout.codec} for n, e in stored.items()}
                        table = table.replace_schema_metadata(self._facts(block, kinds))
                        parquet = _open_parquet(handle, table, list(kinds))
                    parquet.write_table(table, row_group_size=len(group))
                    done, size, group = following, 0, []
            finally:
                if parquet is not None:
                    parquet.close()

    def _complete(self, sample: Mapping[str, Encoded]) -> dict[str, Encoded]:
        """A sample with an empty value for each source that it lacks, but other rows of the cache have; these last."""
        sources = [source_name(number) for number in range(self.layout.sources)]
        own = {name: value for name, value in sample.items() if name not in sources}
        return own | {name: sample.get(name, self.layout.no_source()) for name in sources}

    def _table(self, rows: pa.Table, samples: Sequence[Mapping[str, Encoded]]) -> pa.Table:
        samples = [self._complete(sample) for sample in samples]
        names = list(samples[0])
        rows = light(rows, names)
        sources = [[s[name].shape for name in source_names_in(names) if s[name].nbytes] for s in samples]
        for column, array in self.source_columns(sources).items():
            rows = rows.append_column(pa.field(column, array.type), array)
        for sample in samples:
            if sample.keys() != samples[0].keys():
                raise CacheError(f"Some samples hold {names}, others {list(sample)}: all must hold the same tensors.")
        for name in names:
            found = [(s[name].shape, s[name].nbytes, zlib.crc32(s[name].data)) for s in samples]
            for column, array in self.stored_columns(name, found).items():
                rows = rows.append_column(pa.field(column, array.type), array)
        for name in names:
            offsets = np.cumsum([0, *(sample[name].nbytes for sample in samples)]).astype(np.int32)
            data = np.concatenate([np.frombuffer(sample[name].data, dtype=np.uint8) for sample in samples])
            array = pa.Array.from_buffers(pa.binary(), len(samples), [None, pa.py_buffer(offsets), pa.py_buffer(data)])
            rows = rows.append_column(pa.field(name, pa.binary(), nullable=False), array)
        return rows


def _open_parquet(handle: BinaryIO, table: pa.Table, payload: Sequence[str]) -> pq.ParquetWriter:
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
