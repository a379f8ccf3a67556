"""Work of other threads beside one's own: what is made ahead of it, and what is done behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


def made_ahead(items: Iterator[T], number: int) -> Iterator[T]:
    """The same items, which a thread makes, as many as `number` before they are asked for. Its errors come in turn."""
    with ThreadPoolExecutor(1) as thread:
        coming = deque[Future[Any]](thread.submit(next, items, _END) for _ in range(number))
        while (item := coming.popleft().result()) is not _END:
            coming.append(thread.submit(next, items, _END))
            yield item


class Behind:
    """Threads that do what they are given in turn. On leaving, all of it is done, whatever ended the block.

    Args:
        threads: How many.
        waiting: Tasks that may be unfinished; whoever gives one more waits for the oldest.
    """

    def __init__(self, threads: int, waiting: int) -> None:
        self._pool = ThreadPoolExecutor(threads)
        self._waiting = waiting
        self._tasks = deque[Future[Any]]()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Gives a task, which may wait for earlier ones. Raises what an earlier one raised."""
        while len(self._tasks) >= self._waiting:
            self._tasks.popleft().result()
        self._tasks.append(self._pool.submit(work, *arguments))
        return self._tasks[-1]

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
                 ) -> None:
        self._pool.shutdown()
        if kind is None:
            for task in self._tasks:
                task.result()
