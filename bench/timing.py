"""Measures time and memory of work on a device, by events on a GPU and by the clock of the host on a CPU.

The sides of a comparison take turns: on a shared machine, only measurements of the same minute are comparable.
"""

import gc
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch

# Statistics over rounds, and Markdown tables.


class Spread(NamedTuple):
    """Median, minimum and maximum over the repeats."""

    median: float
    least: float
    most: float


class Ratio(NamedTuple):
    """Median and quartiles of a ratio over the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def ratio(above: list[float], below: list[float]) -> Ratio:
    """Returns the ratio of two sides, taken round by round."""
    quotients = [a / b for a, b in zip(above, below, strict=True)]
    return Ratio(statistics.median(quotients), *quartiles(quotients))


def quartiles(values: list[float]) -> tuple[float, float]:
    """Returns the first and the third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def rotated(names: list[str], turn: int) -> list[str]:
    """`names`, beginning with another one in each turn."""
    place = turn % len(names)
    return names[place:] + names[:place]


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


Work = Callable[[], Any]


def take_turns(
    works: dict[str, Work], device: torch.device, repeats: int, warm_up: int = 1, reset: Work = lambda: None, in_a_row: int = 1
) -> dict[str, list[float]]:
    """Returns the seconds that each work takes in each repeat, by name. The order rotates.

    `reset` runs before each work and is not timed. Works run `in_a_row` times, so that the host of a GPU can launch the next one
    while one runs; the seconds are those of one.
    """

    def run(work: Work) -> None:
        for _ in range(in_a_row):
            work()

    taken: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(-warm_up, repeats):
        for name in rotated(list(works), repeat):
            reset()
            seconds = timed(partial(run, works[name]), device) / in_a_row
            taken[name] += [seconds] if repeat >= 0 else []
    return taken


def timed(work: Work, device: torch.device) -> float:
    """Seconds from an idle device to the end of `work`, kernel launches included."""
    if device.type != "cuda":
        start = perf_counter()
        work()
        return perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def peak_bytes(work: Work, device: torch.device) -> int | None:
    """Returns the peak memory of `work` above what was allocated before, in bytes; None on a CPU, which does not count it."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
