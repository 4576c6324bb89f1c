"""Stream a cache: the index is read row by row, never at once; payloads are read as in a map-style cache."""

import copy
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import IterableDataset

from ...errors import CacheError, SciflowError
from ..cache import (
    CAPTION_COLUMNS,
    FLUX_H,
    CacheIndex,
    LatentCache,
    check_inside,
    find_empty_prompt,
    find_index,
    light_names,
    read_table,
    row_shapes,
)
from ..layouts.base import Columns, Reader, as_objects
from ..layouts.inline import InlineReader
from ..online import OnlineImages
from ..row_filter import RowFilter
from ..split import check_eval_fraction, held_out_groups, is_held_out
from .index import read_tables, stream_file
from .order import EpochRows, Place, Row

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_FILES_AT_ONCE = 8
_INLINE_FILES = 256  # whose offsets are kept
_BECOME_ARRAYS = ("latent_shape", "prompt_embeds_shape", "source_shapes", "bucket_h", "bucket_w")
_PathLike = str | os.PathLike[str]


class StreamingCache(IterableDataset[dict[str, torch.Tensor]]):
    """The samples of a cache one after another, in an order that follows from (seed, epoch); made by `load_cache`.

    In memory are `shuffle_buffer` rows of the index (the order of its files is also shuffled; 0 keeps the order of
    the files) and the samples at hand. `for sample in stream` gives every sample of an epoch once, as `cache[i]`
    does; training goes by `StreamLoader`.

    Only the footers of the index files are read when it is opened, and with `row_filter` the columns that decide.

    Args:
        dataset_dir, payload_dir, dtype: as of `load_cache`.
        shuffle_buffer: rows of the index that are held to be shuffled; 0 keeps the order of the files.
        weights: one number per `dataset_dir`: how many samples of each an epoch draws, in proportion. Every sample
            comes at least once. Without, all index files are one sequence.
        row_filter: as of `load_cache`; a byte a row is kept in memory.

    Raises:
        CacheError: for a missing or empty cache, or index files that do not fit together.
        SciflowError: for options out of range, and as `load_cache` for a `row_filter`.

    Attributes:
        files: of the index, in the order of the rows.
        metadata: as of `LatentCache`.
        dtype: of the floating tensors.
        online_text, online_images: as of `LatentCache`.
        shuffle_buffer: rows.
        seed: of the order of `for sample in stream`.
    """

    online_text: Callable[[list[str]], dict[str, torch.Tensor]] | None = None
    online_images: OnlineImages | None = None

    def __init__(
        self,
        dataset_dir: _PathLike | Sequence[_PathLike],
        *,
        payload_dir: _PathLike | None = None,
        dtype: torch.dtype = torch.bfloat16,
        shuffle_buffer: int = 10_000,
        weights: Sequence[float] | None = None,
        row_filter: Sequence[str] = (),
    ) -> None:
        if shuffle_buffer < 0:
            raise SciflowError(f"`shuffle_buffer` is {shuffle_buffer}, but must be at least 0.")
        self.files, self.metadata = find_index(dataset_dir)
        if tables := [file.name for file in self.files if file.layout == FLUX_H]:
            raise CacheError(
                f"`streaming`: {tables[0]} lists images, and npz files lie next to them: it is read at once. "
                "Leave `--streaming` out, or rewrite the cache by `sciflow-hf cache convert --payload inline`."
            )
        sources = self.files[-1].source + 1
        if weights is not None and (len(weights) != sources or not all(weight > 0 for weight in weights)):
            raise SciflowError(
                f"`weights` is {list(weights)}, but must be one number above 0 for each of {sources} caches."
            )
        self.dtype, self.shuffle_buffer, self.weights, self._payload_dir = dtype, shuffle_buffer, weights, payload_dir
        self._starts = np.cumsum([0, *(file.footer.num_rows for file in self.files)]).tolist()
        self.row_filter, self._kept = tuple(row_filter), list[np.ndarray]()  # of each file, which rows
        if row_filter:
            self._filter(RowFilter(row_filter))
        counts = [int(kept.sum()) for kept in self._kept]
        self._counts = counts or [file.footer.num_rows for file in self.files]
        self.seed, self._epoch, self._length = 0, 0, sum(self._counts)
        self._eval_fraction = 0.0
        self._stand_in: str | None = None
        self._running: EpochRows | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._roots: dict[int, str] = {}
        self._inline: dict[int, InlineReader] = {}  # they know where values begin in the files of inline caches

    def _filter(self, row_filter: RowFilter) -> None:
        for file in self.files:
            there = [name for name in row_filter.columns if name in file.schema.names]
            table = read_table(file.name, there)
            columns = {name: table.column(name) for name in there}
            self._kept.append(row_filter.mask(columns, file.footer.num_rows))
        row_filter.close("`dataset_dir`", light_names(file.schema for file in self.files))

    def __len__(self) -> int:
        """Number of samples. An epoch with `weights` shows some of them more than once."""
        return self._length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        state, self._resumed = self._resumed, None
        self._running = EpochRows(self, self.seed, self._epoch, state)
        for row in self._running:
            yield self.view([row])[0]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the newest iteration is: plain values that JSON takes."""
        rows = self._running
        return {"epoch": self._epoch, "seed": self.seed, "rows": None if rows is None else rows.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration continues after the sample that was given last before `state_dict()`."""
        self._epoch, self.seed, self._resumed = state["epoch"], state["seed"], state["rows"]

    def split(self, eval_fraction: float) -> tuple["StreamingCache", LatentCache | None]:
        """Training part as a stream, evaluation part as a cache of the rows that are held out (None: no rows).

        The same groups are held out as by `LatentCache.split`. Reads the light columns of the complete index once.

        Raises:
            SciflowError: if `eval_fraction` is not in [0, 1), or nothing is left to train on.
        """
        check_eval_fraction(eval_fraction)
        train = copy.copy(self)
        train._eval_fraction, train._running, train._resumed = eval_fraction, None, None
        train.__dict__.pop("fingerprint", None)
        if not eval_fraction:
            return train, None

        def held_out_of(part: int) -> list[Row]:
            return [row for row, _ in self.read_rows(part) if not train.keeps(row)]

        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            held_out = [row for rows in pool.map(held_out_of, range(len(self.files))) for row in rows]
            if not held_out:
                rows = (row for part in range(len(self.files)) for row, _ in self.read_rows(part))
                train._stand_in = next(iter(held_out_groups(map(self._group, rows), eval_fraction)), None)
                held_out = [row for rows in pool.map(held_out_of, range(len(self.files))) for row in rows]
        train._length = self._length - len(held_out)
        if not train._length:
            raise SciflowError(
                f"`eval_fraction` {eval_fraction} puts all groups into the evaluation part and leaves nothing to train "
                "on. Make it smaller or add data."
            )
        if not held_out:
            logger.warning("`eval_fraction` %s: there is one group only, so none is held out.", eval_fraction)
        return train, self.view(held_out) if held_out else None

    # -- as a LatentCache ----------------------------------------------------------------------------------------

    @property
    def index_files(self) -> list[str]:
        """The parquet files of the index."""
        return [file.name for file in self.files]

    @property
    def index(self) -> "datasets.IterableDataset":
        """The rows of the index as `datasets` streams them: the light columns, in the order of the files."""
        import datasets

        return datasets.concatenate_datasets([stream_file(file, self.files[0].columns) for file in self.files])

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over the footers of the index files and what decides the order; the same wherever they lie."""
        order = (self.shuffle_buffer, self.weights, self._eval_fraction)
        digest = hashlib.sha256(repr((*order, self.row_filter) if self.row_filter else order).encode())
        for file in self.files:
            groups = map(file.footer.row_group, range(file.footer.num_row_groups))
            lie = hashlib.sha256(repr([(group.num_rows, group.total_byte_size) for group in groups]).encode())
            digest.update(f"{file.source} {file.name.removeprefix(file.folder)} {lie.hexdigest()}\n".encode())
        return digest.hexdigest()[:16]

    @property
    def has_sources(self) -> bool:
        """Whether a row of the index may have sources."""
        return any("source_shapes" in file.schema.names for file in self.files)

    @cached_property
    def empty_prompt(self) -> dict[str, torch.Tensor] | None:
        """Text keys of the empty prompt, for caption dropout; None if the cache was built without."""
        return self.first().empty_prompt

    def check_family(self, encoder_settings: Mapping[str, Any]) -> None:
        """As `LatentCache.check_family`."""
        self.first().check_family(encoder_settings)

    def first(self) -> LatentCache:
        """The first row of the index as a cache, for a look at shapes."""
        return self.view([self._first_row])

    def describe(self, number: int) -> str:
        """Row `number` (`row` of a batch) in words: its number in the index, its image and its payload."""
        return self.view([self._row(number)]).describe(0)

    @cached_property
    def _first_row(self) -> Row:
        return next(row for part in range(len(self.files)) for row, _ in self.read_rows(part))

    # -- rows ----------------------------------------------------------------------------------------------------

    def number(self, row: Row) -> int:
        """Number of a row in the complete index."""
        return self._starts[row.part] + row.row

    def _row(self, number: int) -> Row:
        """The row of that number; reads its file up to there."""
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        return next(row for row, _ in self.read_rows(part, number - self._starts[part]))

    def read_rows(self, part: int, start: int = 0, place: Place | None = None) -> Iterator[tuple[Row, Place]]:
        """Rows of index file number `part` from row `start` on, each with a place from which it can be read again.

        Rows that `row_filter` leaves out are passed over.

        Args:
            place: of a row that was read before and is not behind `start`; else the file is read from its beginning.

        Raises:
            CacheError: if the file cannot be read, or a row is not what it must be.
        """
        for here, table in read_tables(self.files[part], self._columns(part), place):
            if here[0] + len(table) > start:
                for row in self._rows_of(part, table, here[0])[max(0, start - here[0]) :]:
                    if not self._kept or self._kept[part][row.row]:
                        yield row, here

    def _columns(self, part: int) -> list[str]:
        """The light columns that are read: with the captions where these are encoded."""
        file = self.files[part]
        captions = [name for name in CAPTION_COLUMNS if name in file.schema.names][:1]
        sources = ["source_images"] if "source_images" in file.schema.names else []
        if self.online_text is None:
            return [*file.columns, *sources]
        if not captions:
            raise CacheError(
                f"the index {file.name} has no captions (column `caption` or `text`), which online encoding needs."
            )
        return [*file.columns, *sources, *captions]

    def _rows_of(self, part: int, table: pa.Table, first: int) -> list[Row]:
        file = self.files[part]
        columns = Columns(table, file.name, self._starts[part] + first)
        if part not in self._roots:
            beside = file.name.rpartition("/")[0] or "."
            own = file.holds_payload
            self._roots[part] = beside if own else file.root(columns, self._payload_dir)
        check_inside(columns, [self._roots[part]])
        latents, texts, sources, sizes = (shapes.tolist() for shapes in row_shapes(columns))
        others = table.drop_columns([name for name in _BECOME_ARRAYS if name in columns.names]).to_pylist()
        return [
            Row(part, first + i, tuple(size), tuple(latent), tuple(text), values, own)
            for i, (size, latent, text, own, values) in enumerate(
                zip(sizes, latents, texts, sources, others, strict=True)
            )
        ]

    def view(self, rows: Sequence[Row]) -> LatentCache:
        """A cache of some rows, in the given order; row numbers in its messages are those of the complete index."""
        order = sorted(range(len(rows)), key=lambda i: rows[i].part)
        ordered = [rows[i] for i in order]
        own = {part: list(group) for part, group in itertools.groupby(ordered, key=lambda row: row.part)}
        tables = [self._table(*part) for part in own.items()]
        starts = np.cumsum([0, *(self.files[part].footer.num_rows for part in own)])
        index = _SomeRows(
            table=pa.concat_tables(tables, promote_options="permissive"),
            readers=[self._reader(*part, table) for part, table in zip(own.items(), tables, strict=True)],
            starts=np.cumsum([0, *map(len, own.values())]),
            sources=np.array([self.files[part].source for part in own], dtype=np.int32),
            latent_shapes=np.array([row.latent_shape for row in ordered], dtype=np.int32),
            text_shapes=np.array([row.text_shape for row in ordered], dtype=np.int32),
            sizes=np.array([row.size for row in ordered], dtype=np.int32),
            source_shapes=as_objects([row.source_shapes for row in ordered]),
            metadata=self.metadata,
            empty_prompt_file=self._empty_prompt_file,
            numbers=[self.number(row) for row in ordered],
            places=np.concatenate(
                [start + np.array([r.row for r in g]) for start, g in zip(starts, own.values(), strict=False)]
            ),
        )
        view = LatentCache(index, dtype=self.dtype, rows=np.argsort(order, kind="stable"))
        view.online_text, view.online_images = self.online_text, self.online_images
        return view

    def _table(self, part: int, rows: Sequence[Row]) -> pa.Table:
        schema = self.files[part].schema
        fields = [schema.field(name) for name in self._columns(part) if name not in _BECOME_ARRAYS]
        return pa.Table.from_pylist([row.values for row in rows], pa.schema(fields))

    def _reader(self, part: int, rows: Sequence[Row], table: pa.Table) -> Reader:
        file = self.files[part]
        if part not in self._roots:  # its rows are those of a saved stream
            next(self.read_rows(part), None)
        if file.holds_payload:
            table = table.append_column("cache_path", pa.array([os.path.basename(file.name)] * len(rows), pa.string()))
            table = table.append_column("inline_row", pa.array([row.row for row in rows], pa.int64()))
        shapes = (np.array([row[name] for row in rows], dtype=np.int32) for name in (3, 4))
        sources = as_objects([row.source_shapes for row in rows])
        reader = file.reader(Columns(table, file.name), self._roots[part], *shapes, sources)
        if isinstance(reader, InlineReader):  # where values begin is looked up once per data file, not once per view
            reader.share(self._inline.setdefault(part, reader))
            if len(self._inline) > _INLINE_FILES:
                self._inline.pop(next(iter(self._inline)))
        return reader

    @cached_property
    def _empty_prompt_file(self) -> str | None:
        return find_empty_prompt([*self._roots.values(), *(file.folder for file in self.files)])

    def sources(self) -> list[tuple[float, float, list[int]]]:
        """(weight, how often an epoch shows each row, numbers of the index files) of what is mixed.

        Without weights all files are one source.
        """
        files = self.files
        if self.weights is None:
            return [(1.0, 1.0, list(range(len(files))))]
        found = []
        for source, weight in enumerate(self.weights):
            parts = [number for number, file in enumerate(files) if file.source == source]
            count = sum(self._counts[part] for part in parts)
            if not count:
                raise CacheError(f"The cache {files[parts[0]].folder} holds no samples: leave it out of `dataset_dir`.")
            found.append((weight, weight / count, parts))
        least = min(repeats for _, repeats, _ in found)
        return [(weight, round(repeats / least, 9), parts) for weight, repeats, parts in found]

    def keeps(self, row: Row) -> bool:
        """Whether a row is on this side of the split."""
        if not self._eval_fraction:
            return True
        group = self._group(row)
        return group != self._stand_in and not is_held_out(group, self._eval_fraction)

    def _group(self, row: Row) -> str:
        """As `LatentCache.groups`."""
        paper, sources, *names = map(row.values.get, ("paper_id", "source_images", "image_path", "cache_path"))
        names = [paper, *(sources or [])[:1], *names]
        return next((str(name) for name in names if name), f"row {self.number(row)}")


@dataclass(frozen=True)
class _SomeRows(CacheIndex):
    """`numbers`: of its rows in the complete index. `places`: of its rows in its files, joined."""

    numbers: Sequence[int] = ()
    places: np.ndarray | None = None

    def number(self, row: int) -> int:
        return self.numbers[row]

    def read_columns(self, names: Sequence[str] | None = None) -> pa.Table:
        return super().read_columns(names).take(pa.array(self.places))
