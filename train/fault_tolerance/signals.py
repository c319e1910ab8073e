"""Requests to save, or to save and stop: a signal to any rank, or a file in the run folder.

SIGTERM, SIGINT and SIGUSR2 or `touch RUN/stop`: save and stop. SIGUSR1 or `touch RUN/save`: save and continue. A handler only
counts, so that no signal, and no second one, can break a step or a save; ranks agree at the end of the step (step_flags.py).
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
SAVING = (signal.SIGUSR1,)


class StopRequests:
    """The requests to this process. They are counted, because one may come while an earlier one is granted."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.stops: list[str] = []
        """The signals or files that asked to stop, in words."""
        self.saves = 0
        self.granted = 0
        """How many of the saves were granted."""

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Handles all these signals."""
        if number in STOPPING:
            self.stops.append(signal.Signals(number).name)
        else:
            self.saves += 1


STOP_REQUESTS = StopRequests()
"""Handlers belong to the process, and so do the requests."""


def install_handlers() -> list[Any]:
    """Handles signals from now on, also those that were blocked. Returns the handlers before; none outside of the main thread."""
    try:
        before = [signal.signal(number, STOP_REQUESTS.handle) for number in (*STOPPING, *SAVING)]
    except ValueError:
        return []
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOPPING, *SAVING))
    return before


def block_signals(numbers: tuple[int, ...] = (*STOPPING, *SAVING)) -> None:
    """Delays signals until `install_handlers`, also in the program that replaces this one by exec."""
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Blocks signals in this thread and in the processes that it starts; this process's handlers still run.

    Another thread receives the signals, and Python calls handlers in the main thread.
    """
    over = Event()

    def receive() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOPPING, *SAVING))
        over.wait()

    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOPPING, *SAVING))
    Thread(target=receive, name="signals", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """Ignores signals after the run has ended: Python itself would let a late one kill the process on its way out."""
    with suppress(ValueError):
        for number in (*STOPPING, *SAVING):
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def handling_signals() -> Iterator[StopRequests]:
    """Handles signals inside; requests from before count too."""
    before = install_handlers()
    try:
        yield STOP_REQUESTS
    finally:
        for number, handler in zip((*STOPPING, *SAVING), before, strict=False):
            signal.signal(number, handler)
        STOP_REQUESTS.clear()
