"""Work that threads do ahead of who needs it, in order."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = min(4, os.cpu_count() or 1)


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], *, ahead: int = 4 * THREADS
) -> Generator[tuple[Item, Result], None, None]:
    """Each of `items` with what `work` makes of it, in their order; at most `ahead` are worked on before their turn.

    An error of `work` is raised when it is the item's turn.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > ahead:
                    first, done = waiting.popleft()
                    yield first, done.result()
            for first, done in waiting:
                yield first, done.result()
        finally:
            pool.shutdown(cancel_futures=True)


class Behind:
    """A thread that works behind its caller, in order, at most `late` pieces late.

    A piece of work returns the calls that its caller makes then, in its own thread and in order, so that only timing
    depends on the thread. An error of the work is raised in the caller, when its turn comes.
    """

    def __init__(self, late: int) -> None:
        self.late, self.waiting, self.pool = late, deque[Future[list[Callable[[], None]]]](), ThreadPoolExecutor(1)

    def put(self, work: Callable[[], list[Callable[[], None]]]) -> None:
        self.waiting.append(self.pool.submit(work))
        self._take(self.late)

    def finish(self) -> None:
        """Waits until all is done."""
        self._take(0)

    def _take(self, left: int) -> None:
        while len(self.waiting) > left:
            done = self.waiting[0].result()  # stays in the queue if Ctrl-C comes in between
            self.waiting.popleft()
            for call in done:
                call()

    def close(self) -> None:
        """After an error: does what was put before it; errors that follow are those of the same cause."""
        self.pool.shutdown()
        for done in self.waiting:
            if done.exception() is None:
                for call in done.result():
                    call()
        self.waiting.clear()
