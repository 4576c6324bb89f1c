"""Stream a cache: the index is read row by row, never at once; payloads are read as in a map-style cache."""

import copy
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset

from ...errors import CacheError, SciflowError
from ..cache import LatentCache
from ..index import BUILD
from ..split import check_eval_fraction, is_held_out
from .index import FILES_AT_ONCE, RowsView, StreamIndex
from .order import EpochRows, Place, Row

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_PathLike = str | os.PathLike[str]


class StreamingCache(IterableDataset[dict[str, torch.Tensor]]):
    """The samples of a cache one after another, in an order that follows from (seed, epoch); made by `load_cache`.

    In memory are `shuffle_buffer` rows of the index (the order of its files is shuffled, too; 0 keeps the order of
    the files) and the samples at hand. `for sample in stream` gives every sample of an epoch once, as `cache[i]`
    does; training goes by `StreamLoader`.

    Attributes:
        shuffle_buffer: rows.
        seed: of the order of `for sample in stream`.
    """

    def __init__(self, rows: StreamIndex, *, shuffle_buffer: int, weights: Sequence[float] | None = None) -> None:
        self._index, self.shuffle_buffer, self.weights = rows, shuffle_buffer, weights
        self.seed, self._epoch, self._length = 0, 0, rows.num_rows
        self._eval_fraction = 0.0
        self._running: EpochRows | None = None
        self._resumed: Mapping[str, Any] | None = None

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

        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            held_out = [row for rows in pool.map(held_out_of, range(len(self._index.files))) for row in rows]
        train._length = self._index.num_rows - len(held_out)
        if not train._length:
            raise SciflowError(
                f"`eval_fraction` {eval_fraction} puts all groups into the evaluation part and leaves nothing to train "
                "on. Make it smaller or add data."
            )
        if not held_out:
            logger.warning("`eval_fraction` %s selects no group: no evaluation.", eval_fraction)
        return train, self.view(held_out) if held_out else None

    # -- as a LatentCache ----------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Of the floating tensors."""
        return self._index.dtype

    @property
    def online_text(self) -> Callable[[list[str]], dict[str, torch.Tensor]] | None:
        """captions -> text tensors (B, ...); where it is set, stored embeddings are not read."""
        return self._index.online_text

    @online_text.setter
    def online_text(self, encode: Callable[[list[str]], dict[str, torch.Tensor]] | None) -> None:
        self._index.online_text = encode

    @property
    def metadata(self) -> dict[str, Any]:
        """Encoder settings and facts of the build; {} for a cache without metadata."""
        return self._index.metadata

    @property
    def part_files(self) -> list[str]:
        """The parquet files of the index."""
        return [file.name for file in self._index.files]

    @property
    def index(self) -> "datasets.IterableDataset":
        """The rows of the index as `datasets` streams them: the light columns, in the order of the files."""
        import datasets

        columns = self._index.files[0].columns
        return datasets.load_dataset(
            "parquet", data_files=self.part_files, columns=columns, split="train", streaming=True
        )

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over the footers of the index files and what decides the order; the same wherever they lie."""
        digest = hashlib.sha256(repr((self.shuffle_buffer, self.weights, self._eval_fraction)).encode())
        for file in self._index.files:
            digest.update(f"{file.source} {file.name.removeprefix(file.folder)} {file.digest}\n".encode())
        return digest.hexdigest()[:16]

    @cached_property
    def empty_prompt(self) -> dict[str, torch.Tensor] | None:
        """Text keys of the empty prompt, for caption dropout; None if the cache was built without."""
        return self._first.empty_prompt

    def check_family(self, encoder_settings: Mapping[str, Any]) -> None:
        """As `LatentCache.check_family`."""
        self._first.check_family(encoder_settings)

    def first_sample(self) -> dict[str, torch.Tensor]:
        """The sample of the first row of the index, for a look at shapes."""
        return self._first[0]

    def describe(self, number: int) -> str:
        """Row `number` (`row` of a batch) in words: its number in the index, its image and its payload."""
        return self.view([self._index.row(number)]).describe(0)

    @cached_property
    def _first(self) -> LatentCache:
        return self.view([self._index.row(0)])

    # -- rows ----------------------------------------------------------------------------------------------------

    def view(self, rows: Sequence[Row]) -> RowsView:
        """A cache of some rows, in the given order; row numbers in its messages are those of the complete index."""
        return self._index.view(rows)

    def number(self, row: Row) -> int:
        """Number of a row in the complete index."""
        return self._index.number(row)

    def sources(self) -> list[tuple[float, float, list[int]]]:
        """(weight, how often an epoch shows each row, numbers of the index files) of what is mixed.

        Without weights all files are one source.
        """
        files = self._index.files
        if self.weights is None:
            return [(1.0, 1.0, list(range(len(files))))]
        found = []
        for source, weight in enumerate(self.weights):
            parts = [number for number, file in enumerate(files) if file.source == source]
            count = sum(files[part].rows for part in parts)
            if not count:
                raise CacheError(f"The cache {files[parts[0]].folder} holds no samples. {BUILD}.")
            found.append((weight, weight / count, parts))
        least = min(repeats for _, repeats, _ in found)
        return [(weight, round(repeats / least, 9), parts) for weight, repeats, parts in found]

    def read_rows(self, part: int, start: int = 0, place: Place | None = None) -> Iterator[tuple[Row, Place]]:
        """As `StreamIndex.read_rows`."""
        return self._index.read_rows(part, start, place)

    def keeps(self, row: Row) -> bool:
        """Whether a row is on this side of the split."""
        return not self._eval_fraction or not is_held_out(self._index.group(row), self._eval_fraction)


def open_stream(
    dataset_dir: _PathLike | Sequence[_PathLike],
    *,
    payload_dir: _PathLike | None = None,
    dtype: torch.dtype = torch.bfloat16,
    shuffle_buffer: int = 10_000,
    weights: Sequence[float] | None = None,
) -> StreamingCache:
    """Opens one or more caches as a stream; only the footers of the index files are read.

    Args:
        dataset_dir, payload_dir, dtype: as of `load_cache`.
        shuffle_buffer: rows of the index that are held to be shuffled; 0 keeps the order of the files.
        weights: one number per `dataset_dir`: how many samples of each an epoch draws, in proportion. Every sample
            comes at least once. Without, all index files are one sequence.

    Raises:
        CacheError: for a missing or empty cache, or index files that do not fit together.
        SciflowError: for options out of range.
    """
    if shuffle_buffer < 0:
        raise SciflowError(f"`shuffle_buffer` is {shuffle_buffer}, but must be at least 0.")
    index = StreamIndex(dataset_dir, payload_dir, dtype)
    if weights is not None and (len(weights) != index.num_sources or not all(weight > 0 for weight in weights)):
        raise SciflowError(
            f"`weights` is {list(weights)}, but must be one number above 0 for each of {index.num_sources} caches."
        )
    return StreamingCache(index, shuffle_buffer=shuffle_buffer, weights=weights)
