"""The sampler that makes an epoch of batches which each hold one bucket."""

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from ...diffusion.randomness import hash64
from ...errors import SciflowError
from ..writing import text_table
from .sizes import check_ints


@dataclass(frozen=True)
class BucketReport:
    """One bucket's part in an epoch, over all ranks.

    Attributes:
        bucket: the batch key, e.g. (height, width) or (height, width, text length).
        samples: rows of the data set in it.
        batches: device batches made of it.
        repeats: places in those batches that hold a row which the epoch also shows elsewhere.
        dropped: places left out (only with `drop_last`): samples + repeats = places + dropped.
    """

    bucket: Hashable
    samples: int
    batches: int
    repeats: int
    dropped: int


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of one bucket each, in an order that is a pure function of (seed, epoch).

    Rows are shuffled inside their bucket and cut into optimizer steps of `batch_size * num_replicas *
    accumulation_steps` rows. A step holds one bucket; ranks and micro-batches are slices of it, so the steps do not
    depend on how the product splits into its three factors. The remainders of all buckets come last, in device batches
    of one bucket each: the last one of a bucket is filled up with other rows of that bucket, and complete batches of
    the largest bucket are added until every rank has the same number. The last step of an epoch may therefore have
    fewer micro-batches than `accumulation_steps`.
    Every row is seen at least once an epoch.

    Args:
        buckets: one hashable per row.
        batch_size: rows of one device batch.
        num_replicas: number of ranks that share the epoch.
        rank: which of them this is.
        accumulation_steps: micro-batches of one optimizer step.
        seed: with the epoch, decides the order.
        shuffle: False keeps the row order inside a bucket, and buckets in order of first appearance.
        drop_last: leave out what does not fill a step (counted in `report()`).
        repeats: how often an epoch shows each row, at least 1; None for once. Of 100 rows of one bucket with 2.25,
            25 are shown a third time, others in every epoch until all have had their turn: so each row gets its
            share, and epochs are equally long. A step holds no row twice where that can be avoided.

    Raises:
        SciflowError: for values out of range, no rows, or when `drop_last` would leave nothing.
    """

    def __init__(
        self,
        buckets: Sequence[Hashable],
        *,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        accumulation_steps: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        repeats: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        check_ints(1, batch_size=batch_size, num_replicas=num_replicas, accumulation_steps=accumulation_steps)
        check_ints(0, rank=rank)
        check_ints(-math.inf, seed=seed)
        if rank >= num_replicas:
            raise SciflowError(f"`rank` is {rank}, but must lie in [0, num_replicas) = [0, {num_replicas}).")
        self.batch_size, self.num_replicas, self.rank = batch_size, num_replicas, rank
        self.accumulation_steps, self.seed = accumulation_steps, int(seed)
        self.shuffle, self.drop_last = bool(shuffle), bool(drop_last)
        self.total_batch = batch_size * num_replicas * accumulation_steps
        self.epoch = 0

        numbers: dict[Hashable, int] = {}
        ids = [numbers.setdefault(bucket, len(numbers)) for bucket in buckets]
        if not ids:
            raise SciflowError(
                "`buckets` is empty: there are no samples to draw. Give the sampler a data set with rows."
            )
        self._ids = np.asarray(ids, dtype=np.int64)
        self._names = list(numbers)
        self._samples = np.bincount(self._ids)
        self._repeats = None if repeats is None else _Repeats(repeats, self._ids, self.seed, self.shuffle)
        # Places of an epoch in each bucket before any is filled up or dropped.
        self._counts = self._samples if self._repeats is None else self._repeats.counts
        self._steps = self._counts // self.total_batch  # full steps of each bucket
        left = self._counts % self.total_batch
        self._tail = np.zeros_like(left) if self.drop_last else -(-left // batch_size)  # device batches in the tail
        self._padding = int(-self._tail.sum() % num_replicas)  # complete batches, of the largest bucket
        self._largest = int(self._counts.argmax())
        self._length = int(self._steps.sum()) * accumulation_steps
        self._length += (int(self._tail.sum()) + self._padding) // num_replicas
        if self._length == 0:
            raise SciflowError(
                f"`drop_last` leaves no batch: the largest bucket, {self._names[self._largest]}, has "
                f"{self._counts.max()} samples, a step takes {self.total_batch} of one bucket ({batch_size} "
                f"per batch x {num_replicas} ranks x {accumulation_steps} accumulation). Switch "
                "`--dataloader_drop_last` off, or make the batch or the accumulation smaller."
            )
        self._made: tuple[int, np.ndarray] | None = None  # the newest epoch and its batches of this rank

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        check_ints(0, epoch=epoch)
        self.epoch = int(epoch)

    def __len__(self) -> int:
        """Micro-batches of this rank in an epoch: the same for all ranks and epochs."""
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches())

    def batches(self) -> list[list[int]]:
        """All micro-batches of this rank in the current epoch, as `__iter__` gives them."""
        return self.epoch_batches().tolist()

    def positions(self, batch_index: int) -> range:
        """Positions in the epoch's order of the rows of this rank's micro-batch number `batch_index`."""
        if not 0 <= batch_index < self._length:
            raise SciflowError(f"`batch_index` is {batch_index}, but an epoch has {self._length} micro-batches.")
        step, micro_batch = divmod(batch_index, self.accumulation_steps)
        start = step * self.total_batch + (micro_batch * self.num_replicas + self.rank) * self.batch_size
        return range(start, start + self.batch_size)

    def report(self) -> list[BucketReport]:
        """Each bucket's part in an epoch, in order of first appearance; the same for all ranks."""
        per_step = self.num_replicas * self.accumulation_steps
        rows = []
        for i, name in enumerate(self._names):
            samples, places = int(self._samples[i]), int(self._counts[i])
            batches = int(self._steps[i]) * per_step + int(self._tail[i])
            batches += self._padding if i == self._largest else 0
            shown = batches * self.batch_size
            dropped = max(places - shown, 0)
            rows.append(BucketReport(name, samples, batches, shown + dropped - samples, dropped))
        return rows

    def table(self, *, max_rows: int = 60) -> str:
        """`report()` as an aligned table, with totals of several; buckets beyond `max_rows` share one line."""
        report = self.report()
        numbers = [(r.samples, r.batches, r.repeats, r.dropped) for r in report]
        names = [_in_words(r.bucket) for r in report]
        lines: list[tuple[str, ...]] = [("bucket", "samples", "batches", "repeats", "dropped")]
        lines += [(name, *map(str, n)) for name, n in zip(names[:max_rows], numbers, strict=False)]
        if len(report) > max_rows:
            rest = [str(sum(column)) for column in zip(*numbers[max_rows:], strict=True)]
            lines.append((f"{len(report) - max_rows} more", *rest))
        if len(report) > 1:
            lines.append(("total", *(str(sum(column)) for column in zip(*numbers, strict=True))))
        return text_table(lines, right=range(1, 5))

    def epoch_batches(self) -> np.ndarray:
        """This rank's batches of the current epoch: (len(self), batch_size), int64."""
        if self._made is None or self._made[0] != self.epoch:
            self._made = (self.epoch, self._make_epoch())
        return self._made[1]

    def _make_epoch(self) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64(hash64(self.seed, self.epoch, "order")))
        rows = rng.permutation(len(self._ids)) if self.shuffle else np.arange(len(self._ids))
        rows = rows[np.argsort(self._ids[rows], kind="stable")]  # bucket by bucket, shuffled inside each
        if self._repeats is not None:
            rows = np.repeat(rows, self._repeats.of_epoch(self.epoch)[rows])
        order = np.split(rows, np.cumsum(self._counts)[:-1])
        if self._repeats is not None:
            order = [_deal(rows, self.total_batch, rng if self.shuffle else None) for rows in order]

        full = [rows[: n * self.total_batch] for rows, n in zip(order, self._steps, strict=True)]
        steps = np.concatenate(full).reshape(-1, self.total_batch)
        if self.shuffle:
            steps = steps[rng.permutation(len(steps))]
        # (steps, A * R * B) -> this rank's (steps * A, B)
        mine = steps.reshape(-1, self.accumulation_steps, self.num_replicas, self.batch_size)[:, :, self.rank]
        mine = mine.reshape(-1, self.batch_size)
        if self.drop_last:
            return mine

        tail = []
        for i in rng.permutation(len(order)) if self.shuffle else range(len(order)):
            tail.append(self._tail_rows(order[i], int(self._steps[i]), int(self._tail[i])))
        # Padding continues where the largest bucket's own fill ended, so that it repeats other rows.
        i, own = self._largest, int(self._tail[self._largest])
        tail.append(self._tail_rows(order[i], int(self._steps[i]), own + self._padding)[own * self.batch_size :])
        batches = np.concatenate(tail).reshape(-1, self.num_replicas, self.batch_size)
        return np.concatenate([mine, batches[:, self.rank]])

    def _tail_rows(self, order: np.ndarray, steps: int, batches: int) -> np.ndarray:
        """The remainder of a bucket's `order` after full `steps`, filled up with its other rows: (batches * B,)."""
        full, left = np.split(order, [steps * self.total_batch])
        fill = order
        if self._repeats is not None:  # a row of the tail is the last to be shown in it again
            fill = np.concatenate([_unique(full[~np.isin(full, left)]), _unique(left)])
            left = _deal(left, self.batch_size, None)
        return np.concatenate([left, np.resize(fill, batches * self.batch_size - len(left))])


def _in_words(key: Hashable) -> str:
    """A batch key as the table names it: "64 x 96 x 12, source latents 8 x 12 and 4 x 4"."""
    if not isinstance(key, tuple):
        return str(key)
    sources = [" x ".join(map(str, part[-2:])) for part in key if isinstance(part, tuple)]
    target = " x ".join(str(part) for part in key if not isinstance(part, tuple))
    return f"{target}, source latents {' and '.join(sources)}" if sources else target


class _Repeats:
    """How often each row comes in an epoch, where that is not once."""

    def __init__(self, repeats: Sequence[float] | np.ndarray, ids: np.ndarray, seed: int, shuffle: bool) -> None:
        wanted = np.asarray(repeats, dtype=np.float64)
        if wanted.shape != ids.shape:
            raise SciflowError(f"`repeats` has shape {wanted.shape}, but there are {len(ids)} rows.")
        bad = np.flatnonzero(~(np.isfinite(wanted) & (wanted >= 1)))
        if bad.size:
            raise SciflowError(f"`repeats` of row {bad[0]} is {wanted[bad[0]]}, but must be at least 1.")
        if wanted.sum() > 1 << 31:
            raise SciflowError(f"`repeats` make an epoch of {wanted.sum():.3g} samples: use smaller ones.")
        wanted = wanted.round(9)  # 2.9999999999 is 3
        self._whole = wanted.astype(np.int64)
        rng = np.random.Generator(np.random.PCG64(hash64(seed, "repeats")))
        rows = rng.permutation(len(ids)) if shuffle else np.arange(len(ids))
        rows = rows[np.lexsort([ids[rows], wanted[rows]])]  # value by value, in each bucket by bucket
        starts = np.flatnonzero((np.diff(wanted[rows], prepend=-1) != 0) | (np.diff(ids[rows], prepend=-1) != 0))
        self._turns: list[tuple[np.ndarray, int]] = []  # rows that take turns, and how many of them an epoch has
        value, due, given = -1.0, 0.0, 0
        for same in np.split(rows, starts[1:]):
            if wanted[same[0]] != value:
                value, due, given = wanted[same[0]], 0.0, 0
            # Rounded in the sum over the buckets, so that the rows of one value get what is theirs together.
            due += (value - int(value)) * len(same)
            self._turns.append((same, round(due) - given))
            given = round(due)
        self.counts = np.bincount(ids, weights=self.of_epoch(0)).astype(np.int64)
        """(buckets,) rows of any epoch."""

    def of_epoch(self, epoch: int) -> np.ndarray:
        """(N,) how often each row comes in that epoch."""
        times = self._whole.copy()
        for rows, extra in self._turns:
            times[rows[(epoch * extra + np.arange(extra)) % len(rows)]] += 1
        return times


def _deal(rows: np.ndarray, size: int, rng: np.random.Generator | None) -> np.ndarray:
    """`rows`, with equal ones side by side, ordered so that consecutive hands of `size` hold no row twice.

    As cards are dealt: one to every hand, round by round, in a random order of the hands (without `rng` from the
    first to the last). Rows that do not fill a hand come last. A row of more copies than hands must repeat.
    """
    hands, left = divmod(len(rows), size)
    if not hands:
        return rows
    dealt = np.empty(len(rows), dtype=np.int64)  # hand of each place
    last, start = 0, 0  # where the round before began, and this one
    for number in range(size):
        count = hands + (number < left)
        turns = np.arange(count) if rng is None else rng.permutation(count)
        if start:  # copies of one row on both sides of the border between two rounds
            taken = dealt[last:start][rows[last:start] == rows[start]]
            here = np.isin(turns, taken)
            turns = np.concatenate([turns[~here], turns[here]]) if taken.size else turns
        dealt[start : start + count] = turns
        last, start = start, start + count
    return rows[np.argsort(dealt, kind="stable")]


def _unique(rows: np.ndarray) -> np.ndarray:
    """Each row once, in order of first appearance."""
    return rows[np.sort(np.unique(rows, return_index=True)[1])]


def image_sizes(dataset: Any) -> Counter[tuple[int, int]]:
    """How many rows of a data set have each height and width, by those of its `buckets` that begin with two numbers."""
    found = (tuple(key)[:2] if isinstance(key, list | tuple) else () for key in getattr(dataset, "buckets", None) or [])
    return Counter((int(size[0]), int(size[1])) for size in found if len(size) == 2 and all(map(_is_number, size)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | np.integer)
