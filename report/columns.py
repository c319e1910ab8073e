"""metrics.jsonl as columns: the steps and values of each number, thinned for the page without a visible difference."""

import itertools
import math
from array import array
from typing import Any, NamedTuple

import numpy as np

from .journal_reader import Record, RunError


class Column(NamedTuple):
    """One metric over time."""

    steps: "array[float]"
    values: "array[float]"


class Columns:
    """All metrics of a run. Values that are neither numbers nor words for non-finite numbers are left out."""

    def __init__(self) -> None:
        self.by_name: dict[str, Column] = {}

    def add(self, record: Record) -> None:
        """Adds the record of a logged step. Raises RunError if it has no step."""
        step = record.values.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise RunError(f"{record.where}: has no step")
        for name, value in record.values.items():
            number = as_number(value)
            if number is not None:
                column = self.by_name.setdefault(name, Column(array("d"), array("d")))
                column.steps.append(step)
                column.values.append(number)

    def last(self, name: str) -> float | None:
        """Returns the newest finite value."""
        found = self.by_name.get(name)
        return next((value for value in reversed(found.values) if math.isfinite(value)), None) if found else None

    def typical(self, name: str) -> float | None:
        """Returns the median of the finite values."""
        found = self.by_name.get(name)
        finite = [value for value in found.values if math.isfinite(value)] if found else []
        return float(np.median(finite)) if finite else None


WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""How a journal writes non-finite numbers, which JSON does not have."""


def as_number(value: Any) -> float | None:
    """Returns `value` as a float; None if it is not a number."""
    if isinstance(value, str):
        return WORDS.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


SMOOTHED_FROM = 120
"""Series with fewer points have no smoothed line."""


def line(column: Column, points: int) -> dict[str, Any]:
    """Returns a series for the page: `x`, `y` with at most about `points` points; `sx`, `sy`, the smoothed line; `bad`, steps with
    non-finite values."""
    x, y = np.asarray(column.steps), np.asarray(column.values)
    finite = np.isfinite(y)
    bad = x[~finite]
    x, y = x[finite], y[finite]
    kept = thinned(y, points)
    shown: dict[str, Any] = {"x": x[kept].astype(int).tolist(), "y": rounded(y[kept])}
    if len(y) >= SMOOTHED_FROM:
        places = np.linspace(0, len(y) - 1, 200).astype(int)
        shown |= {"sx": x[places].astype(int).tolist(), "sy": rounded(smoothed(y)[places])}
    if len(bad):
        shown |= {"bad": bad[:100].astype(int).tolist(), "bad_count": len(bad)}
    return shown


def thinned(y: np.ndarray, points: int) -> np.ndarray:
    """Returns the sorted indices of about `points` values: the first, the last, minimum and maximum of equal stretches."""
    if len(y) <= points:
        return np.arange(len(y))
    edges = np.linspace(0, len(y), max(1, points // 2) + 1).astype(int)
    spans = list(itertools.pairwise(edges))
    extremes = [begin + pick(y[begin:end]) for begin, end in spans for pick in (np.argmin, np.argmax)]
    return np.unique([0, *extremes, len(y) - 1])


def smoothed(y: np.ndarray) -> np.ndarray:
    """Returns the mean around each value, over a fiftieth of all values; at the ends over those that exist."""
    half = max(1, len(y) // 100)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    at = np.arange(len(y))
    begin, end = np.maximum(at - half, 0), np.minimum(at + half + 1, len(y))
    return (sums[end] - sums[begin]) / (end - begin)


def rounded(values: Any, digits: int = 5) -> list[Any]:
    """Returns values rounded to `digits` significant digits; non-finite values become None."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in np.asarray(values, dtype=float).tolist()]
