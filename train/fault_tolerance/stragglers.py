"""Which rank the others wait for: each rank's own time of a step, without what it spent waiting for others, compared at times.

It is the host's time: work, data and input of this rank; on a GPU the work is seen where the host waits for it.
"""

from statistics import median
from time import perf_counter

from ...parallel.progress import PROGRESS
from ..logging.run_logger import Reporter

SHARE = 0.1
"""A rank is named if the others lose so much of their time with it."""


class Stragglers:
    """Keeps this rank's times, and compares those of all."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.own: list[float] = []
        self.whole: list[float] = []
        self.begin: tuple[float, float] | None = None
        self.suspect: int | None = None
        """The slow rank of the comparison before: one slow stretch is chance, two are not."""
        self.alerted: int | None = None
        """The rank that people were told of last: they are told once, and events.jsonl each time."""

    def seconds(self, step: int) -> float | None:
        """At the begin of each step. The median of this rank's own seconds, on steps on which all ranks tell it."""
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

    def compare(self, step: int, seconds: list[float], reporter: Reporter) -> None:
        """Reports the slowest rank if it costs the others much."""
        if not seconds or not self.whole:
            return
        whole, self.whole = median(self.whole), []
        rank = max(range(len(seconds)), key=seconds.__getitem__)
        others = median(seconds[:rank] + seconds[rank + 1 :] or [seconds[rank]])
        lost = (seconds[rank] - others) / max(whole, 1e-9)
        before, self.suspect = self.suspect, rank if lost >= SHARE else None
        if self.suspect is not None and self.suspect == before:
            facts = {"rank": rank, "seconds": seconds[rank], "others": others, "lost_share": lost}
            text = (
                f"rank {rank} is slow: {seconds[rank]:.3f} s a step of its own, the others {others:.3f} s; {lost:.0%} of all time"
            )
            reporter.event("straggler", step=step, **facts)
            if self.alerted != rank:
                reporter.alert("straggler", text)
            self.alerted = rank
