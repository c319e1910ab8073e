"""Time and memory of work on a device: events on a GPU, the clock of the host on a CPU. Sides of a comparison take turns.

On a machine that others use too, only what ran in the same minute can be compared.
"""

import gc
import statistics
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch

# Numbers of several rounds as one figure, and figures as tables.


class Spread(NamedTuple):
    """Over the repeats."""

    median: float
    least: float
    most: float


class Ratio(NamedTuple):
    """Of the rounds: the median and the quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def ratio(above: list[float], below: list[float]) -> Ratio:
    """Of one side's numbers to another's, round by round."""
    quotients = [a / b for a, b in zip(above, below, strict=True)]
    return Ratio(statistics.median(quotients), *quartiles(quotients))


def quartiles(values: list[float]) -> tuple[float, float]:
    """The first and the third."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def rotated(names: list[str], turn: int) -> list[str]:
    """Another one begins in each turn."""
    place = turn % len(names)
    return names[place:] + names[:place]


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


Work = Callable[[], Any]


def take_turns(
    works: dict[str, Work], device: torch.device, repeats: int, warm_up: int = 1, reset: Work = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each repeat, by name. A repeat is one run of each work, in another order every time.

    `reset` comes before each, outside of the time.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(-warm_up, repeats):
        for name in rotated(list(works), repeat):
            reset()
            seconds = timed(works[name], device)
            taken[name] += [seconds] if repeat >= 0 else []
    return taken


def timed(work: Work, device: torch.device) -> float:
    """Seconds from an idle device to the end of the work, launches included."""
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
    """The most memory that the work holds at once above what was held before; None on a CPU, which does not count."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
