"""Threads that read batches ahead of the training step, into buffers that are used again and again."""

import functools
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Protocol

import torch

Index = tuple[Any, ...]
"""(row, position, key) of a sample, perhaps with the key of its optimizer step; in a stream the row itself."""
Layout = Mapping[str, tuple[Sequence[int], torch.dtype]]
"""{name: (shape, dtype)}."""
Carve = Callable[[Layout], dict[str, torch.Tensor]]
_ALIGNMENT = 64  # bytes


class Samples(Protocol):
    """Source of a `ThreadedReader`; `loader.KeyedDataset` is one."""

    def read_batch(self, indices: Sequence[Index], carve: Carve) -> dict[str, torch.Tensor]:
        """A batch whose large tensors `carve` made, filled. Called in a reader thread, several at a time."""

    def complete(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Adds what is not read but computed. Called by the consumer, as it takes the batch."""


class Batch(dict[str, torch.Tensor]):
    """A batch whose tensors lie in a buffer of a `ThreadedReader`.

    They stay as they are until `release`, which empties the batch and lets the buffer be filled again. A batch that is
    dropped without it costs a new buffer, and its tensors live on for as long as somebody keeps them.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], give_back: Callable[[bool], None]) -> None:
        super().__init__(tensors)
        self._give_back = give_back

    def release(self) -> None:
        """The tensors are no longer needed. Work with them that a GPU has been given already is waited for."""
        self.clear()  # nobody reads what comes next by mistake, and memory that a buffer has outgrown is freed
        self._give_back(True)

    def __del__(self) -> None:
        self.clear()
        self._give_back(False)


def release(batch: Any) -> None:
    """Gives a batch back to its loader, if it is one that wants it back."""
    if isinstance(batch, Batch):
        batch.release()


class Buffer:
    """Memory of one batch; grows to the largest that it was asked for."""

    storage: torch.Tensor

    def __init__(self, *, pin_memory: bool = False) -> None:
        self.pin_memory = pin_memory
        self.leave()
        self._last_use: Any = None  # CUDA event

    def carve(self, layout: Layout) -> dict[str, torch.Tensor]:
        """Tensors of these shapes and dtypes, side by side in this memory; what it held before is gone."""
        if self._last_use is not None:
            self._last_use.synchronize()
            self._last_use = None
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in layout.values()]
        ends = list(itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes))
        if ends and ends[-1] > self.storage.numel():
            del self.storage  # before, not after the larger one is made
            self.storage = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=self.pin_memory)
        return {
            name: self.storage[start : start + size].view(dtype).view(tuple(shape))
            for (name, (shape, dtype)), start, size in zip(layout.items(), [0, *ends], sizes, strict=False)
        }

    def leave(self) -> None:
        """Gives this memory up to the tensors that lie in it."""
        self.storage = torch.empty(0, dtype=torch.uint8)

    def mark_use(self) -> None:
        """The next `carve` waits for what the current CUDA stream has been given so far."""
        if self.pin_memory:
            self._last_use = torch.cuda.Event()
            self._last_use.record()


class ThreadedReader(Iterator[Batch]):
    """Batches in the order of `batches`, read ahead by threads.

    There are `buffers` batches: being read, read, or handed out. A consumer that holds as many without releasing
    one gets fresh memory for every further batch; the reader keeps no reference to a batch that is handed out.

    The threads end with the last batch, with the first error (which is raised where its batch would have come),
    when this object is closed or collected, and at the interpreter's exit. They never outlive `close`.

    Args:
        samples: reads the batches; a `loader.KeyedDataset` does it for any data set with `members(row)`,
            `read_into(row, out, members)` and `dtype`.
        batches: (row, position, key) of every sample, batch by batch. Advanced in the reader threads, by one at a
            time, and no further than `buffers` batches ahead of the consumer.
        threads: that read, 1 or more.
        buffers: batches that the consumer holds at once, and two.
        pin_memory: buffers in page-locked memory, for CUDA.
    """

    def __init__(
        self,
        samples: Samples,
        batches: Iterable[Sequence[Index]],
        *,
        threads: int = 2,
        buffers: int = 3,
        pin_memory: bool = False,
    ) -> None:
        self._work = _Work(samples, iter(batches), buffers, pin_memory)
        workers = [threading.Thread(target=self._work.run, name="reader", daemon=True) for _ in range(threads)]
        for worker in workers:
            worker.start()
        self._finalize = weakref.finalize(self, self._work.stop, workers)

    def __next__(self) -> Batch:
        if not self._finalize.alive:
            raise StopIteration
        try:
            batch = self._work.take()
            self._work.samples.complete(batch)
            return batch
        except BaseException:  # also the end and Ctrl-C
            self.close()
            raise

    def close(self) -> None:
        """Ends the threads and waits for them: at most for one batch each. Batches handed out stay as they are."""
        self._finalize()


class _Work:
    """State shared by the threads and the consumer. Knows nothing of the `ThreadedReader`, so that can be collected."""

    def __init__(self, samples: Samples, batches: Iterator[Sequence[Index]], buffers: int, pin_memory: bool) -> None:
        self.samples, self.batches, self.pin_memory = samples, batches, pin_memory
        # Queues of C and a set: a batch may be collected, and so come back, in the middle of anything.
        self.free: SimpleQueue[Buffer | None] = SimpleQueue()
        self.started: SimpleQueue[Future[tuple[Buffer, dict[str, torch.Tensor]] | None]] = SimpleQueue()
        self.handed_out: set[int] = set()  # numbers of batches that are to come back
        self.numbers, self.buffers = itertools.count(), buffers
        self.order, self.ended = threading.Lock(), False
        for _ in range(buffers):
            self.free.put(Buffer(pin_memory=pin_memory))

    # -- threads -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        while self._read_one():  # a function of its own: a frame that waits must not keep the last batch alive
            pass

    def _read_one(self) -> bool:
        future: Future[tuple[Buffer, dict[str, torch.Tensor]] | None] = Future()
        try:
            with self.order:  # a batch is begun only with the buffer for it: later ones cannot use them all up
                buffer = None if self.ended else self.free.get()
                if buffer is None or self.ended:
                    return False
                self.started.put(future)
                indices = next(self.batches, None)
                if indices is None:
                    self.ended = True
                    future.set_result(None)
                    return False
            future.set_result((buffer, self.samples.read_batch(indices, buffer.carve)))
            return True
        except BaseException as error:  # whatever it is, it belongs to the consumer
            self.ended = True
            # That one alone would look like the end of the data.
            future.set_exception(RuntimeError(repr(error)) if isinstance(error, StopIteration) else error)
            return False

    # -- consumer ------------------------------------------------------------------------------------------------

    def take(self) -> Batch:
        if len(self.handed_out) == self.buffers:  # no thread could ever continue: forget the oldest
            self.handed_out.discard(min(self.handed_out))
            self.free.put(Buffer(pin_memory=self.pin_memory))
        result = self.started.get().result()
        if result is None:
            raise StopIteration
        buffer, tensors = result
        self.handed_out.add(number := next(self.numbers))
        return Batch(tensors, functools.partial(self.take_back, number, buffer))

    def take_back(self, number: int, buffer: Buffer, unused: bool) -> None:
        """Once per batch that was not forgotten, with `unused` False where its tensors may live on."""
        try:
            self.handed_out.remove(number)
        except KeyError:
            return
        if unused:
            buffer.mark_use()
        else:
            buffer.leave()
        self.free.put(buffer)

    def stop(self, workers: Sequence[threading.Thread]) -> None:
        self.ended = True
        self.handed_out.clear()  # nothing comes back any more
        self.free.put(None)  # wakes the one that waits for a buffer
        if threading.current_thread() not in workers:  # the garbage collector may run in any thread
            for worker in workers:
                worker.join()
