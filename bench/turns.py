"""Sides of a comparison that take turns: on a machine that others use too, only what ran in the same minute can be compared."""

import statistics
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import NamedTuple


class Ratio(NamedTuple):
    """Of the rounds: the median and the quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def take_turns(sides: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each call; a round calls each side once, in another order every time."""
    for side in sides.values():
        for _ in range(warm_up):
            side()
    names, seconds = list(sides), {name: [] for name in sides}
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            start = perf_counter()
            sides[name]()
            seconds[name].append(perf_counter() - start)
    return seconds


def ratio(above: list[float], below: list[float]) -> Ratio:
    """Of one side's numbers to another's, round by round."""
    quotients = [a / b for a, b in zip(above, below, strict=True)]
    low, _, high = statistics.quantiles(quotients, n=4) if len(quotients) > 1 else 3 * quotients
    return Ratio(statistics.median(quotients), low, high)
