"""Numbers of several rounds as one figure, and figures as tables. Needs no torch: parents of processes use it too."""

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple


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
