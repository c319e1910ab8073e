"""Formats numbers for people."""

import math


def short(number: float) -> str:
    """Returns a number of any size in at most 7 characters: 999, 12,345, 1.23M, 46.7B."""
    if not math.isfinite(number):
        return str(number)
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(number) >= size * 0.9995:
            return f"{_digits(number / size)}{unit}"
    return f"{number:,.0f}"


def gigabytes(number: float) -> str:
    """Returns the bytes in decimal units, as device memory is sold."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:,.0f} {unit}"
    return f"{number:,.0f} bytes"


def flops(number: float) -> str:
    """FLOPs with the unit's usual prefix: 12.3 GFLOP."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size * 0.9995:
            return f"{_digits(number / size)} {unit}FLOP"
    return f"{number:,.0f} FLOP"


def _digits(number: float) -> str:
    """Returns three significant digits."""
    return f"{number:.2f}" if abs(number) < 9.995 else f"{number:.1f}" if abs(number) < 99.95 else f"{number:.0f}"
