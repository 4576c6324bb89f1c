"""Work that threads do ahead of who needs it, in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = min(4, os.cpu_count() or 1)


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], *, ahead: int = 4 * THREADS
) -> Iterator[tuple[Item, Result]]:
    """Each of `items` with what `work` makes of it, in their order; at most `ahead` are worked on before their turn.

    What `work` raises is raised when it is the item's turn.
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
