"""Streams of one's own, such as a `datasets.IterableDataset`: the order is theirs, steps, keys and resuming ours."""

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ...diffusion.randomness import hash64
from ...errors import SciflowError, counted
from ..batches.loader import BatchLoader, seeded

logger = logging.getLogger(__name__)


class OwnStreamLoader(BatchLoader):
    """Endless batches of an iterable data set, in its own order: epoch follows epoch, nothing is left out or repeated.

    Every rank reads all samples and collates its own, so that 1 x 4 and 2 x 2 train on the same steps. All samples of
    a step must stack. The random draws of a sample follow from (seed, epoch, number in the epoch).

    A checkpoint holds the stream's own `state_dict()`. Where there is none, or `datasets` shuffles in a buffer (whose
    content is not in its state), resuming reads the epoch again from its beginning and passes over what was trained on.

    Args:
        stream: gives dicts, as often as it is iterated over; `set_epoch(epoch)` is called before, if there is one.
        batch_size, num_replicas, rank, accumulation_steps, seed: as of `BucketBatchSampler`.
        check: called with the first batch, before it is used.
        options: of `BatchLoader`.
    """

    def __init__(
        self,
        stream: Any,
        *,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        accumulation_steps: int = 1,
        seed: int = 0,
        check: Callable[[dict[str, Any]], None] = lambda batch: None,
        **options: Any,
    ) -> None:
        super().__init__(stream, seed=seed, total_batch=batch_size * num_replicas * accumulation_steps, **options)
        self.batch_size, self.num_replicas, self.rank, self.check = batch_size, num_replicas, rank, check
        self._epoch, self._in_epoch, self._taken = 0, 0, 0  # the epoch, samples read of it, samples read in all
        self._state: Mapping[str, Any] | None = None

    def set_epoch(self, epoch: int) -> None:
        """The epoch that an iteration from the beginning begins with."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the newest iteration is, behind the batch that was taken last; plain values that JSON takes.

        Raises:
            SciflowError: the stream's own state is something else.
        """
        state = {
            "samples": self._taken,
            "epoch": self._epoch,
            "in_epoch": self._in_epoch,
            "stream": self.dataset.state_dict() if _states_are_exact(self.dataset) else None,
        }
        try:
            json.dumps(state)
        except (TypeError, ValueError) as error:
            raise SciflowError(
                f"`train_dataset`: its `state_dict()` goes into the checkpoint, and must be what JSON takes ({error})."
            ) from error
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration starts behind the batch that was taken last before `state_dict()`."""
        self._state, self._start = state, int(state["samples"]) // (self.batch_size * self.num_replicas)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        each, first = self.batch_size * self.num_replicas, self._start
        samples, self._start, self._state = self._samples(first * each, self._state), 0, None
        for number in itertools.count(first):
            read = list(itertools.islice(samples, each))  # of all ranks, so that the state is that of all
            own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
            positions = range(number * each, (number + 1) * each)[own]
            indices = self._indices(0, positions, positions)
            batch = self._keyed.collated(read[own], indices)
            if number == first:
                self.check(batch)
            self._taken = (number + 1) * each
            yield self._keyed.complete(self._keyed.drawn(batch))

    def _samples(self, start: int, state: Mapping[str, Any] | None) -> Iterator[Any]:
        """The samples from number `start` on."""
        first, self._in_epoch, left = self._epoch, 0, start
        if state is not None and state["samples"] <= start:
            first, left = state["epoch"], start - state["samples"]
            if state["stream"] is not None and _states_are_exact(self.dataset):
                self.dataset.load_state_dict(state["stream"])
                self._in_epoch = state["in_epoch"]
            else:
                left += state["in_epoch"]
        if left:
            logger.info("Passing over %s of the stream, trained on before.", counted(left, "sample"))
        for self._epoch in itertools.count(first):
            for sample in self._of_epoch():
                if left:
                    left -= 1
                else:
                    yield sample
            if not self._in_epoch:
                raise SciflowError(
                    f"`train_dataset` gives no sample in epoch {self._epoch}. It is iterated over once an epoch: make "
                    "sure that `iter` starts anew."
                )
            self._in_epoch = 0

    def _of_epoch(self) -> Iterator[Any]:
        if callable(getattr(self.dataset, "set_epoch", None)):
            self.dataset.set_epoch(self._epoch)
        samples, end = iter(self.dataset), object()
        while True:
            with seeded(hash64(self.seed, self._epoch, self._in_epoch)):
                sample = next(samples, end)
            if sample is end:
                return
            self._in_epoch += 1
            yield sample


def _states_are_exact(stream: Any) -> bool:
    """Whether a stream continues behind its last sample once its `state_dict` is loaded."""
    parts = [getattr(stream, "_ex_iterable", None)]
    for part in parts:  # grows while it is walked
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return False
        if part is not None:
            parts += [getattr(part, "ex_iterable", None), *(getattr(part, "ex_iterables", None) or [])]
    return callable(getattr(stream, "state_dict", None)) and callable(getattr(stream, "load_state_dict", None))
