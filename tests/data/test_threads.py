"""Reader threads and their buffers: order, reuse, what is never overwritten, errors, and that threads end."""

import gc
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from _thread import interrupt_main

import pytest
import torch

from sciflow_hf.data.batches import threads as module
from sciflow_hf.data.batches.threads import Batch, ThreadedReader, release

PATIENCE = 20  # seconds until a test that waits for nothing fails


@pytest.fixture(autouse=True)
def no_thread_survives():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class Numbers:
    """Batch n is (n, n + 1, ...) in a shape that depends on n; `before` is called in the thread that reads it."""

    def __init__(self, *, before=lambda number: None, sizes=(1000,)):
        self.before, self.sizes, self.completed = before, sizes, []

    def layout(self, number):
        return {"a": ((2, self.sizes[number % len(self.sizes)]), torch.bfloat16), "b": ((2, 3), torch.int64)}

    def expected(self, number):
        return {n: torch.full(s, number).to(d) for n, (s, d) in self.layout(number).items()}

    def read_batch(self, indices, carve):
        ((number, _, _),) = indices
        tensors = carve(self.layout(number))
        self.before(number)
        for tensor in tensors.values():
            tensor.fill_(number)
        return tensors | {"row": torch.tensor([number])}

    def complete(self, batch):
        self.completed.append((int(batch["row"]), threading.current_thread()))

    def check(self, batch, number):
        expected = self.expected(number)
        assert all(torch.equal(batch[n], v) and batch[n].dtype == v.dtype for n, v in expected.items())
        assert batch["row"].tolist() == [number]


def indices(count):
    return ([(number, 0, 0)] for number in range(count))


@pytest.fixture
def memory(monkeypatch):
    """The buffers' memory that is alive, now and at most: a function -> bytes, and its `peak`."""
    made, empty = weakref.WeakSet(), torch.empty

    def alive():
        return sum(storage.nbytes() for storage in list(made))

    def spy(*args, pin_memory=None, **kwargs):
        tensor = empty(*args, **kwargs)
        if pin_memory is not None:
            made.add(tensor.untyped_storage())
            alive.peak = max(alive.peak, alive())
        return tensor

    alive.peak = 0
    monkeypatch.setattr(module.torch, "empty", spy)
    return alive


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("held", [1, 3])
def test_batches_come_in_order_and_are_whole_while_they_are_held(threads, held):
    samples, waiting, count = Numbers(sizes=(1000, 10, 3000)), [], 0
    for batch in ThreadedReader(samples, indices(50), threads=threads, buffers=held + 2):
        waiting.append((batch, count))
        count += 1
        if len(waiting) == held:
            for one, number in waiting:
                samples.check(one, number)
            for one, _ in waiting:
                one.release()
            waiting = []
    assert count == 50
    assert samples.completed == [(number, threading.current_thread()) for number in range(50)]


def test_a_batch_read_later_does_not_overtake():
    """Batch 0 is read only when 1 and 2 are: the consumer gets it first all the same."""
    others = threading.Barrier(3)
    samples = Numbers(before=lambda number: others.wait(PATIENCE) if number < 3 else None)
    assert [int(batch["row"]) for batch in ThreadedReader(samples, indices(6), threads=3)] == list(range(6))


def test_threads_cannot_use_up_the_buffers_before_the_next_batch_has_one():
    """One buffer, many threads: every batch but the next would block for ever."""
    numbers = []
    for batch in ThreadedReader(Numbers(), indices(200), threads=4, buffers=1):
        numbers.append(int(batch["row"]))
        batch.release()
    assert numbers == list(range(200))


@pytest.mark.parametrize("accumulation", [1, 8])
def test_released_buffers_are_reused_and_no_others_are_made(memory, accumulation):
    """(accumulation + 2) x the largest batch."""
    buffers, sizes = accumulation + 2, (512, 4096, 1024, 8, 9, 10, 11)  # 7 and the buffers take turns
    largest = 2 * 4096 * 2 + 64  # bytes: bfloat16, and six int64 in a slot of 64
    held, places = [], set()
    for number, batch in enumerate(ThreadedReader(Numbers(sizes=sizes), indices(180), threads=2, buffers=buffers)):
        held.append(batch)
        if number >= 90:  # by now each has held the largest
            places.add(batch["a"].untyped_storage().data_ptr())
        if len(held) == accumulation:
            for one in held:  # what stays in `held`, as in the trainer, must not keep memory
                one.release()
            kept, held = held, []
    assert not any(kept) and memory.peak == buffers * largest and len(places) == buffers


def test_no_more_than_the_buffers_are_read_ahead():
    begun, read = [], threading.Semaphore(0)
    source = (begun.append(number) or [(number, 0, 0)] for number in range(100))
    reader = ThreadedReader(Numbers(before=lambda number: read.release()), source, threads=4, buffers=5)
    for _ in range(5):
        assert read.acquire(timeout=PATIENCE)
    assert begun == list(range(5))
    held = next(reader)  # its buffer is not there for others
    reader.close()
    assert begun == list(range(5)) and held["row"].tolist() == [0]


def test_what_is_not_released_is_not_overwritten(memory):
    samples = Numbers()
    batches = list(ThreadedReader(samples, indices(20), threads=2, buffers=3))
    for number, batch in enumerate(batches):
        samples.check(batch, number)
    assert len({batch["a"].data_ptr() for batch in batches}) == 20
    one = 2 * 1000 * 2 + 32 + 64
    del batches, batch
    assert memory() <= 3 * one


def test_tensors_outlive_a_batch_that_is_dropped(memory):
    """A loop that keeps one tensor of each batch, or nothing: memory is what it keeps, and the buffers."""
    samples, kept, one = Numbers(), [], 2 * 1000 * 2 + 32 + 64
    reader = ThreadedReader(samples, indices(40), threads=2, buffers=3)
    for number in range(40):
        batch = next(reader)
        if number < 10:
            kept.append(batch["a"][1])
        del batch
        assert memory() <= (min(number + 1, 10) + 3) * one
    assert memory.peak <= 13 * one
    assert all(torch.equal(row, samples.expected(number)["a"][1]) for number, row in enumerate(kept))


def test_a_loop_that_drops_its_batches_is_read_ahead_for():
    read = threading.Semaphore(0)
    reader = ThreadedReader(Numbers(before=lambda number: read.release()), indices(100), threads=2, buffers=3)
    for _ in range(8):
        next(reader)
    for _ in range(8 + 3):
        assert read.acquire(timeout=PATIENCE)


def test_a_batch_released_twice_gives_its_buffer_once():
    samples = Numbers()
    reader = ThreadedReader(samples, indices(12), threads=2, buffers=3)
    first = next(reader)
    for _ in range(4):
        release(first)
    release({"a": torch.zeros(1)})  # batches of other loaders
    held = [next(reader) for _ in range(11)]
    for number, batch in enumerate(held):
        samples.check(batch, number + 1)
    held[3].release()  # forgotten long ago
    held[3].release()


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_comes_where_its_batch_would_have_come(threads):
    def fail(number):
        if number >= 7:
            raise KeyError(f"broken file {number}")

    samples, seen = Numbers(before=fail), []
    reader = ThreadedReader(samples, indices(20), threads=threads, buffers=4)
    with pytest.raises(KeyError, match="broken file 7") as caught:
        for batch in reader:
            seen.append(int(batch["row"]))
            batch.release()
    assert seen == list(range(7))
    assert "in fail" in "".join(traceback.format_exception(caught.value))  # the line in the reader thread
    assert not [t for t in threading.enumerate() if t.name == "reader"]  # although the traceback lives
    assert list(reader) == []


@pytest.mark.parametrize("error", [StopIteration(), ValueError("of the order")], ids=repr)
def test_no_error_looks_like_the_end(error):
    def fail(number):
        if number == 3 and isinstance(error, StopIteration):
            raise error

    def order():
        yield from indices(3)
        raise error

    source = indices(9) if isinstance(error, StopIteration) else order()
    seen = []
    with pytest.raises((RuntimeError, ValueError)):
        seen.extend(int(batch["row"]) for batch in ThreadedReader(Numbers(before=fail), source))
    assert seen == [] or len(seen) == 3


def test_an_error_of_complete_ends_the_threads():
    samples = Numbers()

    def complete(batch):
        raise ValueError("no captions")

    samples.complete = complete
    reader = ThreadedReader(samples, indices(9))
    with pytest.raises(ValueError, match="no captions"):
        next(reader)
    assert not [t for t in threading.enumerate() if t.name == "reader"]


def test_threads_end_when_the_iterator_is_left():
    def alive():
        return [t for t in threading.enumerate() if t.name == "reader"]

    next(ThreadedReader(Numbers(), indices(100), threads=4))
    assert not alive()
    reader = ThreadedReader(Numbers(), indices(100), threads=4)
    batch = next(reader)
    assert len(alive()) == 4
    reader.close()
    reader.close()
    assert not alive() and list(reader) == []
    Numbers().check(batch, 0)
    batch.release()
    circle = [ThreadedReader(Numbers(), indices(100))]
    circle.append(circle)
    next(circle[0])
    del circle
    gc.collect()
    assert not alive()
    consumed = ThreadedReader(Numbers(), indices(3))
    assert len(list(consumed)) == 3 and not alive()


def test_ctrl_c_ends_the_threads():
    def interrupt(number):
        if number == 5:
            interrupt_main()

    # A shell starts what runs in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        reader = ThreadedReader(Numbers(before=interrupt), indices(10**5), threads=2)
        with pytest.raises(KeyboardInterrupt):
            for batch in reader:
                batch.release()
        reader.close()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not [t for t in threading.enumerate() if t.name == "reader"]


def test_an_interpreter_exits_with_readers_left_open():
    """Blocked for a buffer, in the middle of a batch, and with batches handed out."""
    code = (
        "import sys; sys.path[:0] = ['tests/data', 'tests/support']\n"
        "from test_threads import *\n"
        "waiting = ThreadedReader(Numbers(), indices(100), threads=4)\n"
        "busy = ThreadedReader(Numbers(sizes=(10**6,)), indices(10**9), threads=4, buffers=50)\n"
        "kept = next(waiting), next(busy)\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_buffer_is_refilled_when_the_gpu_is_done_with_it(memory, monkeypatch):
    """The event of a release is waited for before the same memory is written again."""
    log = []

    class Event:
        def record(self):
            log.append(("record", self))

        def synchronize(self):
            log.append(("wait", self))

    monkeypatch.setattr(module.torch.cuda, "Event", Event)
    samples = Numbers(before=lambda number: log.append(("read", number)))
    reader = ThreadedReader(samples, indices(6), threads=1, buffers=1, pin_memory=True)
    for batch in reader:
        assert isinstance(batch, Batch)
        batch.release()
    kinds = [kind for kind, _ in log]
    assert kinds == ["read", *(["record", "wait", "read"] * 5), "record"]
    recorded = [event for kind, event in log if kind == "record"]
    assert [event for kind, event in log if kind == "wait"] == recorded[:5] and len(set(recorded)) == 6
