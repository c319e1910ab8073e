"""Reads and tokenizes a bounded number of windows of each slot ahead, in threads of this rank."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar, final

Raw = TypeVar("Raw")
Made = TypeVar("Made")


@final
class Prefetcher(Generic[Raw, Made]):
    """Yields `make(item)` for each of `items`, in order. With a pool, up to `depth` of them are under way or done.

    One thread at a time reads `items`; `make` runs concurrently. An error of reading is raised in its place and by each later call.
    """

    def __init__(self, items: Iterator[Raw], make: Callable[[Raw], Made], pool: ThreadPoolExecutor | None, depth: int) -> None:
        self._items = items
        self._make = make
        self._pool = pool
        self._depth = depth
        self._turn, self._ordered = 0, 0
        self._may_read = threading.Condition()
        self._waiting: deque[Future[Made | None]] = deque()
        self._failure: BaseException | None = None
        self._fill()

    def next(self) -> Made:
        """Waits for the next one and returns it."""
        if self._pool is None:
            return self._make(next(self._items))
        self._fill()
        made = self._waiting.popleft().result()
        assert made is not None, "asked for more than there is"
        self._fill()
        return made

    def _fill(self) -> None:
        while self._pool is not None and len(self._waiting) < self._depth:
            self._waiting.append(self._pool.submit(self._job, self._ordered))
            self._ordered += 1

    def _job(self, turn: int) -> Made | None:
        # The pool starts jobs in the order of their turns, so the job that has the turn is running.
        with self._may_read:
            self._may_read.wait_for(lambda: self._turn == turn)
        try:
            raw = self._read()
        finally:
            with self._may_read:
                self._turn += 1
                self._may_read.notify_all()
        return None if raw is None else self._make(raw)

    def _read(self) -> Raw | None:
        if self._failure is not None:
            raise self._failure
        try:
            return next(self._items, None)
        except BaseException as error:
            self._failure = error
            raise
