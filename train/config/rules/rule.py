"""`Violation`, which rules yield, and helpers for its candidates."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Violation(NamedTuple):
    """A rule that does not hold. `key` is the setting to change, `candidates` are values that may fix it."""

    key: str
    rule: str
    candidates: Iterable[object]
    place: int = 0
    """The index of the rule in RULES."""


def valid_pairs(schedule: list[float], valid: Callable[[float, float], bool]) -> list[float]:
    """Returns the pairs of a flattened schedule that are valid, in the order of their first numbers."""
    right = {first: second for first, second in zip(schedule[::2], schedule[1::2], strict=False) if valid(first, second)}
    return [number for first in sorted(right) for number in (first, right[first])]


def divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def multiples(unit: int, number: int) -> list[int]:
    """Returns the positive multiples of `unit` around `number`."""
    below = number // unit
    return [unit * factor for factor in range(max(1, below - 8), below + 9)]
