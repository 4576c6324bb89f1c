"""From a stream to batches: the same steps of one bucket on every rank, which reads its own part of the payload."""

import copy
import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ...errors import CacheError, SciflowError
from ..batches.loader import BatchLoader
from ..batches.threads import Carve, Index
from .order import EpochRows, Row, row_from_json, tuples
from .stream import StreamingCache

_SNAPSHOT = 1000  # rows between two


class StreamLoader(BatchLoader):
    """Endless batches of a stream, in the form of `BucketLoader`: one bucket each, steps and keys from positions.

    All ranks read all light rows and form the same steps of batch_size x num_replicas x accumulation_steps rows of
    one bucket; of their payloads each reads its own only. The remainder at the end of an epoch comes in batches of one
    bucket each, filled up with rows of the same bucket, in complete steps (`BucketBatchSampler` makes the same batches,
    but lets the last step of an epoch be shorter). Then the next epoch begins.

    Args:
        stream: see `load_cache`.
        batch_size, num_replicas, rank, accumulation_steps, seed, drop_last: as of `BucketBatchSampler`.
        options: of `BatchLoader`.
    """

    def __init__(
        self,
        stream: StreamingCache,
        *,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        accumulation_steps: int = 1,
        seed: int = 0,
        drop_last: bool = False,
        **options: Any,
    ) -> None:
        total_batch = batch_size * num_replicas * accumulation_steps
        super().__init__(stream, seed=seed, total_batch=total_batch, **options)
        self.batch_size, self.num_replicas, self.rank = batch_size, num_replicas, rank
        self.accumulation_steps, self.drop_last = accumulation_steps, drop_last
        self._epoch, self._taken = 0, 0
        self._state: Mapping[str, Any] | None = None
        self.shapes: dict[Any, Row] = {}  # a row of each batch key: all others have its shapes
        self._snapshots: deque[tuple[int, dict[str, Any]]] = deque()  # (steps before it, what comes after)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that an iteration from the beginning begins with."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the newest iteration is, behind the batch that was taken last; plain values that JSON takes."""
        steps, snapshot = self._newest_snapshot() or (0, None)
        samples = self._taken * self.batch_size * self.num_replicas
        return {"total_batch": self.total_batch, "samples": samples, "steps": steps, "snapshot": snapshot}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration starts behind the batch that was taken last before `state_dict()`.

        Raises:
            SciflowError: the state is of another total batch.
        """
        if state["total_batch"] != self.total_batch:
            raise SciflowError(
                f"this stream was saved with {state['total_batch']} samples a step, and now a step takes "
                f"{self.total_batch} ({self.batch_size} x {self.num_replicas} ranks x {self.accumulation_steps} "
                "accumulation). Choose batch size and accumulation so that the product is as before."
            )
        self._state, self._start = state, int(state["samples"]) // (self.batch_size * self.num_replicas)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        batches = self._places(self._start)
        self._taken, self._start, self._state = self._start, 0, None
        return self._read(self, batches, self._epoch)

    # -- as the samples of a reader ------------------------------------------------------------------------------

    def read_batch(self, places: Sequence[Index], carve: Carve | None = None) -> dict[str, Any]:
        """As of `KeyedDataset`, but what it calls the number of a row is a `Row` here."""
        keyed = copy.copy(self._keyed)
        keyed.dataset = view = self.dataset.view([row for row, *_ in places])
        indices = [(i, *rest) for i, (_, *rest) in enumerate(places)]
        batch: dict[str, Any] = keyed[indices] if carve is None else keyed.read_batch(indices, carve)
        batch["row"] = torch.tensor([self.dataset.number(row) for row, *_ in places])
        return batch | ({"captions": view.captions} if keyed.online else {})

    __getitem__ = read_batch

    def complete(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._keyed.complete(batch)
        self._taken += 1
        self._newest_snapshot()
        return batch

    def _newest_snapshot(self) -> tuple[int, dict[str, Any]] | None:
        """The last one that is not behind what was taken; older ones are forgotten."""
        steps = self._taken // self.accumulation_steps
        while len(self._snapshots) > 1 and self._snapshots[1][0] <= steps:
            self._snapshots.popleft()
        return self._snapshots[0] if self._snapshots and self._snapshots[0][0] <= steps else None

    # -- order ---------------------------------------------------------------------------------------------------

    def _places(self, start: int) -> Iterator[list[Index]]:
        """Micro-batches of this rank from number `start` on. The snapshots are those of the newest call."""
        saved, self._snapshots = self._state, deque()
        if saved is None or saved["snapshot"] is None or saved["steps"] * self.accumulation_steps > start:
            return self._batches(start, 0, self._epoch, None, self._snapshots)
        return self._batches(start, saved["steps"], saved["snapshot"]["epoch"], saved["snapshot"], self._snapshots)

    def _batches(
        self, start: int, step: int, begin: int, state: Mapping[str, Any] | None, snapshots: deque[Any]
    ) -> Iterator[list[Index]]:
        for epoch in itertools.count(begin):
            steps = _EpochSteps(self, epoch, state)
            state, first = None, step
            for number, step_rows, snapshot in steps:
                if snapshot is not None:
                    snapshots.append((step, snapshot))
                for micro in range(max(0, start - step * self.accumulation_steps), self.accumulation_steps):
                    offset = (micro * self.num_replicas + self.rank) * self.batch_size
                    rows = step_rows[offset : offset + self.batch_size]
                    first_position = number * self.total_batch + offset
                    yield self._indices(epoch, rows, range(first_position, first_position + len(rows)))
                step += 1
            if step == first and not steps.resumed:
                raise SciflowError(
                    f"an epoch of this stream gives no batch: a step takes {self.total_batch} rows of one bucket. "
                    "Switch `--dataloader_drop_last` off, or make the batch or the accumulation smaller."
                )


class _EpochSteps:
    """Rows of the optimizer steps of one epoch: (number in the epoch, total_batch rows, maybe a snapshot before it)."""

    def __init__(self, loader: StreamLoader, epoch: int, state: Mapping[str, Any] | None) -> None:
        self.loader, self.epoch, self.resumed = loader, epoch, state is not None
        self.rows = EpochRows(loader.dataset, loader.seed, epoch, state and state["rows"])
        self.number = state["number"] if state else 0
        # By batch key: rows that do not fill a step yet; those of the first step, to fill up the last batches with.
        self.waiting, self.first = (
            {tuples(key): [row_from_json(row) for row in rows] for key, rows in (state[name] if state else ())}
            for name in ("waiting", "first")
        )
        self.counts: dict[Any, int] = {tuples(key): count for key, count in (state["counts"] if state else ())}

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "number": self.number,
            "rows": self.rows.state_dict(),
            "waiting": [[key, list(rows)] for key, rows in self.waiting.items()],
            "first": [[key, rows] for key, rows in self.first.items()],
            "counts": [[key, count] for key, count in self.counts.items()],
        }

    def __iter__(self) -> Iterator[tuple[int, list[Row], dict[str, Any] | None]]:
        total, unsaved = self.loader.total_batch, 0
        snapshot: dict[str, Any] | None = self.state_dict()
        for row in self.rows:
            key = self._key(row)
            waiting = self.waiting.setdefault(key, [])
            waiting.append(row)
            self.counts[key] = self.counts.get(key, 0) + 1
            unsaved += 1
            if len(waiting) < total:
                continue
            del self.waiting[key]
            self.first.setdefault(key, waiting)
            yield self.number, waiting, snapshot
            self.number += 1
            snapshot, unsaved = (self.state_dict(), 0) if unsaved >= _SNAPSHOT else (None, unsaved)
        if not self.loader.drop_last:
            tail = self._tail()
            for start in range(0, len(tail), total):
                yield self.number, tail[start : start + total], snapshot
                self.number, snapshot = self.number + 1, None

    def _key(self, row: Row) -> Any:
        """The batch key. CacheError where rows of one key have other shapes."""
        pads_text = self.loader.pads_text
        key = (*row.size, *(() if pads_text else row.text_shape[:1]), *row.source_shapes)
        same = self.loader.shapes.setdefault(key, row)
        if row.latent_shape != same.latent_shape or row.text_shape[1:] != same.text_shape[1:]:
            one, other = (self.loader.dataset.view([r]).describe(0) for r in (row, same))
            raise CacheError(
                f"{one} and {other} share the bucket {key} (height, width, text length), but their shapes "
                f"(C, h, w, L, D) are {row.latent_shape + row.text_shape} and {same.latent_shape + same.text_shape}. "
                "Run `sciflow-hf cache build` again, all rows with the same encoders."
            )
        return key

    def _tail(self) -> list[Row]:
        """Left-over rows as complete steps: each batch of one key, filled up with rows that were shown long ago."""
        loader, tail = self.loader, list[Row]()
        if not self.counts:
            return []
        largest = max(self.counts, key=lambda key: self.counts[key])
        last: dict[Any, Iterator[Row]] = {}
        fill: Iterator[Row]
        for key, rows in self.waiting.items():
            last[key] = fill = itertools.cycle([*rows, *self.first.get(key, [])])
            count = -(-len(rows) // loader.batch_size) * loader.batch_size
            tail += itertools.islice(fill, count)
        fill = last[largest] if largest in last else itertools.cycle(self.first[largest])
        return [*tail, *itertools.islice(fill, -len(tail) % loader.total_batch)]
