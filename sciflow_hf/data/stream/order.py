"""The order of a stream: rows of index files as they come, mixed and shuffled, from any saved point on."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ...diffusion.randomness import hash64


class Row(NamedTuple):
    """One row of an index: what is needed to batch it, find it and read it, and no payload."""

    part: int  # number of the index file
    row: int  # in that file
    size: tuple[int, int]  # height, width in pixels
    latent_shape: tuple[int, int, int]
    text_shape: tuple[int, int]  # (0, 0) where no embeddings are stored
    values: dict[str, Any]  # other columns
    source_shapes: tuple[tuple[int, ...], ...] = ()  # (C, h, w) of each source


def row_from_json(values: Sequence[Any]) -> Row:
    """The inverse of what `json` makes of a `Row`."""
    part, row, size, latent_shape, text_shape, rest, *sources = values  # without the last in older checkpoints
    return Row(part, row, tuple(size), tuple(latent_shape), tuple(text_shape), rest, *map(tuples, sources))


def tuples(values: Any) -> Any:
    """Lists that were tuples before they became JSON, at any depth."""
    return tuple(map(tuples, values)) if isinstance(values, list | tuple) else values


Place = tuple[int, Any]
"""Where an index file can be read from: the number of a row, and the `state_dict` of its stream there."""


class Rows(Protocol):
    """Source of the order; `StreamingCache` is one."""

    shuffle_buffer: int

    def sources(self) -> list[tuple[float, float, list[int]]]:
        """(weight, how often an epoch shows each row, numbers of the index files) of what is mixed."""

    def read_rows(self, part: int, start: int, place: Place | None) -> Iterator[tuple[Row, Place]]:
        """Rows of one index file from row `start` on, and places that are not behind them."""

    def keeps(self, row: Row) -> bool:
        """Whether the row belongs to the stream."""


class EpochRows(Iterator[Row]):
    """Rows of one epoch, in an order that follows from (seed, epoch).

    Index files come one after another in random order, through a shuffle buffer: every row that comes takes the place
    of a random one, which goes. Several sources are drawn from in proportion to their weights. Without a buffer the
    order is that of the files.

    (`datasets.IterableDataset.shuffle` forgets what is in its buffer when it is saved.)
    """

    def __init__(self, rows: Rows, seed: int, epoch: int, state: Mapping[str, Any] | None = None) -> None:
        self._size = rows.shuffle_buffer
        self._random = random.Random(hash64(seed, epoch, "stream"))
        self._buffer: list[Row] = []
        cursors: Sequence[Any] = state["sources"] if state else [(0, 0, 0, None)] * len(rows.sources())
        self._weights = [weight for weight, _, _ in rows.sources()]
        self._sources = [
            _Source(rows, parts, repeats, hash64(seed, epoch, number), cursor)
            for number, ((_, repeats, parts), cursor) in enumerate(zip(rows.sources(), cursors, strict=True))
        ]
        self._open = list(range(len(self._sources)))
        if state:
            version, words, gauss = state["random"]
            self._random.setstate((version, tuple(words), gauss))
            self._buffer = [row_from_json(row) for row in state["buffer"]]
            self._open = list(state["open"])

    def state_dict(self) -> dict[str, Any]:
        """The argument `state` that continues after the last row that was given: plain values and `Row`s."""
        return {
            "sources": [source.cursor() for source in self._sources],
            "open": list(self._open),
            "buffer": list(self._buffer),
            "random": self._random.getstate(),
        }

    def __next__(self) -> Row:
        while (row := self._draw()) is not None:
            if not self._size:
                return row
            if len(self._buffer) < self._size:
                self._buffer.append(row)
                continue
            place = int(self._random.random() * self._size)
            row, self._buffer[place] = self._buffer[place], row
            return row
        if not self._buffer:
            raise StopIteration
        place = int(self._random.random() * len(self._buffer))
        self._buffer[place], self._buffer[-1] = self._buffer[-1], self._buffer[place]
        return self._buffer.pop()

    def _draw(self) -> Row | None:
        """The next row of a source; None when all are at their end."""
        while self._open:
            number = self._open[0]
            if len(self._open) > 1:
                number = self._random.choices(self._open, [self._weights[n] for n in self._open])[0]
            row = self._sources[number].draw()
            if row is not None:
                return row
            self._open.remove(number)
        return None


class _Source:
    """Rows of some index files, each `repeats` times: so many passes, of which the last may show some rows only."""

    def __init__(self, rows: Rows, parts: Sequence[int], repeats: float, seed: int, cursor: Sequence[Any]) -> None:
        self._rows, self._parts, self._repeats, self._seed = rows, parts, repeats, seed
        self._pass, self._index, self._start, place = cursor
        if isinstance(place, int):  # an older checkpoint: the start of a piece, and rows of it that were given
            self._start, place = self._start + place, None
        self._place: Place | None = place
        self._iterator = self._read()

    def cursor(self) -> list[Any]:
        """Pass, place in the order of files, number of the next row in its file, and a place to read from."""
        return [self._pass, self._index, self._start, self._place]

    def draw(self) -> Row | None:
        """The next row; None at the end."""
        return next(self._iterator, None)

    def _read(self) -> Iterator[Row]:
        while self._pass < math.ceil(self._repeats):
            parts = list(self._parts)
            if self._rows.shuffle_buffer:
                random.Random(hash64(self._seed, self._pass, "files")).shuffle(parts)
            for part in parts[self._index :]:
                for row, place in self._rows.read_rows(part, self._start, self._place):
                    self._start, self._place = row.row + 1, place
                    if self._rows.keeps(row) and self._shown(row):
                        yield row
                self._index, self._start, self._place = self._index + 1, 0, None
            self._pass, self._index = self._pass + 1, 0

    def _shown(self, row: Row) -> bool:
        share = self._repeats - self._pass
        return share >= 1 or hash64(self._seed, row.part, row.row, "repeat") < int(share * 2.0**64)
