"""Finds a slow rank: every few steps the ranks compare their own time of a step, without the time spent waiting for others.

It is the host's time: computation, data and input of this rank. On a GPU the computation shows where the host waits for it.
"""

from statistics import median
from time import perf_counter

from ...parallel.progress import PROGRESS
from ..logging.run_logger import RunLogger

SHARE = 0.1
"""A rank is reported if the others lose this share of their time because of it."""


class Stragglers:
    """Measures this rank's times, and compares those of all ranks."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.own: list[float] = []
        self.whole: list[float] = []
        self.begin: tuple[float, float] | None = None
        self.suspect: int | None = None
        """The slow rank of the last comparison: one slow stretch is chance, two are not."""
        self.alerted: int | None = None
        """The rank of the last alert: there is one alert for a rank, and an event each time."""

    def seconds(self, step: int) -> float | None:
        """Called when a step begins. Returns the median of this rank's own seconds, on steps on which all ranks report it."""
        now = perf_counter(), PROGRESS.waited
        if self.begin is not None:
            whole = now[0] - self.begin[0]
            self.whole.append(whole)
            self.own.append(whole - (now[1] - self.begin[1]))
        self.begin = now
        if not self.every or step % self.every:
            return None
        own, self.own = median(self.own or [0.0]), []
        return own

    def compare(self, step: int, seconds: list[float], run_logger: RunLogger) -> None:
        """Reports the slowest rank if it costs the others much. `seconds`: those of each rank, empty if they were not reported."""
        if not seconds or not self.whole:
            return
        whole, self.whole = median(self.whole), []
        rank = max(range(len(seconds)), key=seconds.__getitem__)
        own, others = seconds[rank], median(seconds[:rank] + seconds[rank + 1 :] or [seconds[rank]])
        lost = (own - others) / max(whole, 1e-9)
        before, self.suspect = self.suspect, rank if lost >= SHARE else None
        if self.suspect is None or self.suspect != before:
            return
        run_logger.log_event("straggler", step=step, rank=rank, seconds=own, others=others, lost_share=lost)
        if self.alerted != rank:
            text = f"rank {rank} is slow: {own:.3f} s a step of its own, the others {others:.3f} s; {lost:.0%} of all time"
            run_logger.alert("straggler", text)
        self.alerted = rank
