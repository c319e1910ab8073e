"""A logged step: its numbers are on the device when the training loop hands it over, and on the host when they are written.

On a CPU both happen at once. On a GPU copies to the host are started without waiting; they are done when the next step is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ...parallel.progress import waiting_for_device
from ...parallel.streams import Event, record_event, seconds_between, to_host
from ..evaluation import Evaluation
from ..step import StepNumbers
from .expert_stats.collector import Snapshot

Interval = tuple[Event, Event]
"""Begin and end of a stretch of training."""


class StepLog(NamedTuple):
    """A step and everything that is logged with it."""

    step: int
    numbers: StepNumbers
    lr: float
    intervals: list[Interval]
    """Training time since the last logged step."""
    tokens: int
    """Trained on since the last logged step."""
    data_wait: float
    """Seconds of `intervals` spent waiting for data."""
    counters: dict[str, float]
    """The counters of the data pipeline."""
    evaluation: Evaluation | None
    """The validation pass after this step, if there was one."""
    snapshot: Snapshot | None
    """The statistics of the experts; None if they are off."""

    def seconds(self) -> float:
        """Returns the length of `intervals` in the device's time. Waits until the device has reached the end of the last one."""
        return sum(seconds_between(begin, end) for begin, end in self.intervals)


class PendingLog:
    """A StepLog whose tensors are being copied to the host."""

    def __init__(self, logged: StepLog) -> None:
        self.logged = logged
        self._numbers = {name: value for name, value in logged.numbers._asdict().items() if isinstance(value, Tensor)}
        self._snapshot = {} if logged.snapshot is None else logged.snapshot.tensors
        self._copy = to_host([*self._numbers.values(), *self._snapshot.values()])

    def done(self) -> bool:
        """Whether `get` returns at once."""
        return self._copy.done()

    def get(self) -> StepLog:
        """Waits for the copies. Returns the StepLog with all tensors on the host."""
        with waiting_for_device():
            values = self._copy.get()
        numbers, snapshot = self.logged.numbers, self.logged.snapshot
        numbers = numbers._replace(**dict(zip(self._numbers, values, strict=False)))
        if snapshot is not None:
            snapshot = snapshot._replace(tensors=dict(zip(self._snapshot, values[len(self._numbers) :], strict=True)))
        return self.logged._replace(numbers=numbers, snapshot=snapshot)


class Stopwatch:
    """Measures the device time and the tokens of training since the last reading, without evaluations and checkpoints."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.tokens = device, 0
        self.intervals: list[Interval] = []
        self.start = record_event(device, timed=True)

    def take(self) -> tuple[list[Interval], int]:
        """Returns the intervals and tokens since the last call."""
        now, tokens = record_event(self.device, timed=True), self.tokens
        intervals = [*self.intervals, (self.start, now)]
        self.start, self.intervals, self.tokens = now, [], 0
        return intervals, tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time inside."""
        self.intervals.append((self.start, record_event(self.device, timed=True)))
        yield
        self.start = record_event(self.device, timed=True)
