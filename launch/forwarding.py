"""Signals that a launcher hands to the ranks it started, instead of ending by them."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from ..train.survival.signals import SAVING, STOPPING, held_back

ENDING = ("SIGHUP", "SIGQUIT")
"""Still end the launcher and the ranks at once."""


@contextmanager
def forwarding() -> Iterator[None]:
    """Inside of the block the signals of train/survival/signals.py go to the child processes of this one; only its main thread may.

    After it they do nothing: the ranks have ended as they were asked to, and so will this process. A child that is started inside
    gets no signal before it asks for them: it is born with them held back.
    """
    forward = Forward()
    for number in (*STOPPING, *SAVING):
        signal.signal(number, forward)
    try:
        with held_back():
            yield
    finally:
        for number in (*STOPPING, *SAVING):
            signal.signal(number, signal.SIG_IGN)


class Forward:
    """The handler. A signal that asks to stop ends this process if there are no ranks yet; when they have ended it does nothing."""

    def __init__(self) -> None:
        self.stopping = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        ranks = children(os.getpid())
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if number in STOPPING:
            if not ranks and not self.stopping:
                raise SystemExit(128 + number)
            self.stopping = True


def children(parent: int) -> list[int]:
    """The processes that `parent` started and that still run; none where there is no /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, owner, *_ = stat.read_text().rpartition(")")[2].split()
            if int(owner) == parent and state != "Z":
                found.append(int(stat.parent.name))
    return found
