"""Random numbers without a generator: each is a pure function of what it is for.

So they depend neither on the layout nor on recomputation nor on accumulation. Keys are int64 and are mixed as splitmix64 mixes its
counter (Steele et al. 2014); all arithmetic is modulo 2**64 and gives the same bits on every device.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a number is for; different purposes are independent."""

    jitter = 1
    radius = 2
    angle = 3
    second_expert = 4
    drop = 5
    hash = 6


def uniform(key: Tensor, columns: int, purpose: Purpose) -> Tensor:
    """fp64 (..., columns) inside of (0, 1), for int64 keys of shape (...)."""
    bits = fold(fold(key, purpose).unsqueeze(-1), torch.arange(columns, device=key.device))
    return (_shift_right(bits, 12).double() + 0.5) * 2.0**-52  # exact: 52 bits and a half


def normal(key: Tensor, columns: int) -> Tensor:
    """fp64 (..., columns) of mean 0 and variance 1 (Box and Muller 1958)."""
    radius = (-2 * uniform(key, columns, Purpose.radius).log()).sqrt()
    return radius * (2 * math.pi * uniform(key, columns, Purpose.angle)).cos()


def fold(key: Tensor, value: Tensor | int) -> Tensor:
    """A new int64 key from a key and a number; the two broadcast."""
    mixed = key * _signed(0x9E3779B97F4A7C15) + value
    mixed = (mixed ^ _shift_right(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shift_right(mixed, 27)) * _signed(0x94D049BB133111EB)
    return mixed ^ _shift_right(mixed, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Without the sign, which torch would shift in."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64)
