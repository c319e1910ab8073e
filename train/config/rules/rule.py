"""What a rule between settings says when it does not hold, and whole numbers that may mend it."""

import math
from collections.abc import Iterable
from typing import NamedTuple


class Broken(NamedTuple):
    """A rule that does not hold: `key` is the setting to change, `candidates` the values that may mend it."""

    key: str
    rule: str
    candidates: Iterable[object]
    place: int = 0
    """Which of RULES it is."""


def divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def multiples(unit: int, number: int) -> list[int]:
    """The positive multiples of `unit` closest to `number`."""
    below = number // unit
    return [unit * factor for factor in range(max(1, below - 8), below + 9)]


def needs(degree: int, world: int) -> str:
    """The rule of a degree of parallelism that `world` ranks are not a multiple of."""
    if world == 1:
        return f"needs {degree} ranks (or a multiple) and this is 1 process, use launch=torchrun launch.ranks={degree} or torchrun"
    return f"must divide the {world} ranks"
