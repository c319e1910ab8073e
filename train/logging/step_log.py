"""A logged step: its numbers are on the device when the training loop hands it over, and on the host when they are written.

On a CPU both happen at once. On a GPU copies to the host are started without waiting; they are done when the next step is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ...parallel.progress import PROGRESS, waiting_for_device
from ...parallel.streams import Event, record_event, seconds_between, to_host
from ..evaluation import Evaluation
from ..step import StepNumbers
from .expert_stats.collector import Snapshot

Interval = tuple[Event, Event]
"""Begin and end of a stretch of training."""


class Waits(NamedTuple):
    """Seconds of training in which this rank waited."""

    exchange: float
    """In collectives, for the messages of other ranks and for these ranks to begin."""
    device: float
    """The host, for the device."""


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
    ranks_2K: Tensor = torch.empty(0)
    """Memory and waits of all ranks (rank_stats.py)."""

    def seconds(self) -> float:
        """Returns the length of `intervals` in the device's time. Waits until the device has reached the end of the last one."""
        return sum(seconds_between(begin, end) for begin, end in self.intervals)


class PendingLog:
    """A StepLog whose tensors are being copied to the host."""

    def __init__(self, logged: StepLog) -> None:
        self.logged = logged
        self._numbers = {name: value for name, value in logged.numbers._asdict().items() if isinstance(value, Tensor)}
        self._snapshot = {} if logged.snapshot is None else logged.snapshot.tensors
        self._copy = to_host([*self._numbers.values(), *self._snapshot.values(), logged.ranks_2K])

    def done(self) -> bool:
        """Whether `get` returns at once."""
        return self._copy.done()

    def get(self) -> StepLog:
        """Waits for the copies. Returns the StepLog with all tensors on the host."""
        with waiting_for_device():
            *values, ranks_2K = self._copy.get()
        numbers, snapshot = self.logged.numbers, self.logged.snapshot
        numbers = numbers._replace(**dict(zip(self._numbers, values, strict=False)))
        if snapshot is not None:
            snapshot = snapshot._replace(tensors=dict(zip(self._snapshot, values[len(self._numbers) :], strict=True)))
        return self.logged._replace(numbers=numbers, snapshot=snapshot, ranks_2K=ranks_2K)


class Stopwatch:
    """Measures the device time, the tokens and the waits of training since the last reading, without validation and checkpoints."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.tokens = device, 0
        self.intervals: list[Interval] = []
        self.start, self.waits_before = record_event(device, timed=True), _waits()

    def take(self) -> tuple[list[Interval], int, Waits]:
        """Returns the intervals, tokens and waits since the last call."""
        now, tokens, waits = record_event(self.device, timed=True), self.tokens, _since(self.waits_before)
        intervals = [*self.intervals, (self.start, now)]
        self.start, self.intervals, self.tokens, self.waits_before = now, [], 0, _waits()
        return intervals, tokens, waits

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time inside."""
        self.intervals.append((self.start, record_event(self.device, timed=True)))
        waits = _since(self.waits_before)
        yield
        self.start = record_event(self.device, timed=True)
        now = _waits()
        self.waits_before = Waits(now.exchange - waits.exchange, now.device - waits.device)


def _waits() -> Waits:
    """Returns the waits of this rank since the process began."""
    return Waits(PROGRESS.waited - PROGRESS.waited_for_device, PROGRESS.waited_for_device)


def _since(before: Waits) -> Waits:
    now = _waits()
    return Waits(now.exchange - before.exchange, now.device - before.device)
