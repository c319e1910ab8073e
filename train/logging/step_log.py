"""A step to log: its numbers are on the device when the loop gives it, and on the host when people and files are told.

On a CPU both are one moment. On a GPU copies to the host are begun and nobody waits; they are there when the next step is done.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ...parallel.progress import waiting_for_device
from ...parallel.streams import Event, record, seconds_between, to_host
from ..evaluation import Evaluation
from ..step import StepNumbers
from .expert_stats.collector import HostSnapshot, Snapshot

Interval = tuple[Event, Event]
"""Begin and end of a stretch of training."""


class StepLog(NamedTuple):
    """A step and what belongs to it."""

    step: int
    numbers: StepNumbers
    lr: float
    intervals: list[Interval]
    """Of training since the last logged step."""
    tokens: int
    """Trained on since then."""
    waited: float
    """Seconds of those for data."""
    data: dict[str, float]
    """What the data has counted."""
    evaluation: Evaluation | None
    """The validation pass after this step, if there was one."""
    snapshot: Snapshot
    """What the watch over the experts has to say."""


class OnHost(NamedTuple):
    """Of a Logged, on the host."""

    numbers: StepNumbers
    seen: HostSnapshot
    seconds: float
    """Of the laps."""


class PendingLog:
    """A Logged on its way to the host."""

    def __init__(self, logged: StepLog) -> None:
        self.logged = logged
        own = {name: value for name, value in logged.numbers._asdict().items() if isinstance(value, Tensor)}
        self._names = list(own)
        self._copy = to_host([*own.values(), *logged.snapshot.tensors.values()])

    def done(self) -> bool:
        """Whether `get` returns at once."""
        return self._copy.done()

    def get(self) -> OnHost:
        """Waits, if it is not done."""
        with waiting_for_device():
            values = self._copy.get()
            seconds = sum(seconds_between(begin, end) for begin, end in self.logged.intervals)
        snapshot, count = self.logged.snapshot, len(self._names)
        numbers = self.logged.numbers._replace(**dict(zip(self._names, values[:count], strict=True)))
        return OnHost(numbers, snapshot.seen(dict(zip(snapshot.tensors, values[count:], strict=True))), seconds)


class Stopwatch:
    """Time, the device's own, and tokens of training since the last look; evaluation and checkpoints are not in it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.tokens = device, 0
        self.intervals: list[Interval] = []
        self.start = record(device, timed=True)

    def take(self) -> tuple[list[Interval], int]:
        """Laps and tokens since the last call."""
        self._lap()
        (intervals, self.intervals), (tokens, self.tokens) = (self.intervals, []), (self.tokens, 0)
        return intervals, tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside."""
        self._lap()
        yield
        self.start = record(self.device, timed=True)

    def _lap(self) -> None:
        now = record(self.device, timed=True)
        self.intervals.append((self.start, now))
        self.start = now
