"""What people and schedulers ask of a run: to save, or to save and stop. A signal to any rank, or a file in the run folder.

SIGTERM, SIGINT and SIGUSR2 or `touch RUN/stop`: save and stop. SIGUSR1 or `touch RUN/save`: save and go on. A handler does nothing
but count, so that no signal, and no second one, can break a step or a save; ranks agree at its end (step_flags.py).
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
SAVING = (signal.SIGUSR1,)


class StopRequests:
    """Of this process. Counted, because one may come while an earlier one is granted."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.stops: list[str] = []
        """What asked to stop, in words."""
        self.saves = 0
        self.granted = 0
        """Of the saves."""

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """The handler of all these signals."""
        if number in STOPPING:
            self.stops.append(signal.Signals(number).name)
        else:
            self.saves += 1

    @property
    def save(self) -> bool:
        return self.saves > self.granted


STOP_REQUESTS = StopRequests()
"""Handlers belong to the process, and so does what they heard."""


def listen() -> list[Any]:
    """Hear from now on, and what was held back. Returns the handlers before. Only the main thread may; others hear nothing."""
    try:
        before = [signal.signal(number, STOP_REQUESTS.hear) for number in (*STOPPING, *SAVING)]
    except ValueError:
        return []
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOPPING, *SAVING))
    return before


def hold_back(numbers: tuple[int, ...] = (*STOPPING, *SAVING)) -> None:
    """Until `listen`, also in the program that takes this one's place: what comes meanwhile is heard then."""
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


@contextmanager
def held_back() -> Iterator[None]:
    """Held back inside of the block, in this thread and in the processes that it starts; this process's handlers still hear them.

    Another thread takes them from the system, and Python calls handlers in the main thread.
    """
    over = Event()

    def take() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOPPING, *SAVING))
        over.wait()

    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOPPING, *SAVING))
    Thread(target=take, name="signals", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """The run has ended, and nothing is left to ask for: Python itself would let a late signal kill the process on its way out."""
    with suppress(ValueError):
        for number in (*STOPPING, *SAVING):
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def listening() -> Iterator[StopRequests]:
    """Hear inside of the block; what was heard before it began counts too."""
    before = listen()
    try:
        yield STOP_REQUESTS
    finally:
        for number, handler in zip((*STOPPING, *SAVING), before, strict=False):
            signal.signal(number, handler)
        STOP_REQUESTS.forget()


class RequestFiles:
    """`RUN/save` and `RUN/stop`, which the first rank looks for at every step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def asks(self, what: str) -> bool:
        return (self.folder / what).exists()

    def granted(self, what: str) -> None:
        """Remove the file, so that it is granted once, if the folder can be written at all."""
        with suppress(OSError):
            (self.folder / what).unlink(missing_ok=True)
