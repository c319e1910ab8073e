"""Random numbers by position: the number at each offset of a tensor depends on the key and the offset alone (Salmon et al. 2011).

Philox4x64-10 makes eight words of 32 bits for each block of eight consecutive offsets, on the host by numpy's generator, elsewhere
(and for runs too short for that) by operators of torch. All arithmetic is of integers, or of fp32 in one kernel for each addition,
product, division and root, which IEEE 754 rounds alike on every device. So the bits are the same on CPUs and GPUs.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

LANES = 8
"""Words of a block."""
HOST_BLOCKS = 32
"""Runs of at least so many blocks are drawn by numpy, which takes microseconds to begin a run."""
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
INCREMENTS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
LOW = 2**32 - 1


def words_of_rectangle(
    key: str, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], device: torch.device
) -> Tensor:
    """Returns the random words, int32 (N,), of a rectangle of the tensor of `shape`, in row-major order.

    A run of offsets that does not begin and end with a block is cut out of the blocks around it.
    """
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    inner = max((dim for dim, size in enumerate(sizes) if size < shape[dim]), default=0)  # dimensions behind it are whole
    run, starts_R = math.prod(sizes[inner:]), torch.tensor([offsets[inner] * strides[inner]], device="cpu")
    for dim in range(inner):
        steps = torch.arange(offsets[dim], offsets[dim] + sizes[dim], device="cpu") * strides[dim]
        starts_R = (starts_R[:, None] + steps).flatten()
    lanes_R = starts_R % LANES
    blocks = -(-(int(lanes_R.max()) + run) // LANES)
    words = random_words(_hash(key), starts_R // LANES, blocks, device)
    if bool((lanes_R == lanes_R[0]).all()):
        return words.narrow(1, int(lanes_R[0]), run).flatten()
    return words.gather(1, (lanes_R[:, None] + torch.arange(run, device="cpu")).to(device)).flatten()


def random_words(key: tuple[int, int], first_R: Tensor, blocks: int, device: torch.device) -> Tensor:
    """Returns the words of `blocks` blocks from each of `first_R` on (R runs): int32 of shape (R, LANES * blocks)."""
    if device.type == "cpu" and blocks >= HOST_BLOCKS:
        generator, runs, here = np.random.Philox(key=np.array(key, np.uint64), counter=0), [], 0
        for first in first_R.tolist():
            generator.advance(first - here)
            runs.append(generator.random_raw(4 * blocks))
            here = first + blocks
        return torch.from_numpy(np.stack(runs) if len(runs) > 1 else runs[0][None]).view(torch.int32)
    # numpy counts up before it makes a block.
    counters = first_R.to(device)[:, None] + torch.arange(1, blocks + 1, device=device)
    return philox(key, counters.flatten()).view(torch.int32).view(len(first_R), -1)


def _hash(key: str) -> tuple[int, int]:
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def philox(key: tuple[int, int], counters_N: Tensor) -> Tensor:
    """Returns four words of 64 bits for each counter, by ten rounds: int64 (N, 4)."""

    words = [*MULTIPLIERS, *((k + step * i) % 2**64 for step in range(10) for k, i in zip(key, INCREMENTS, strict=True))]
    signed = [word - 2**64 if word >> 63 else word for word in words]
    multiplier_2, *keys = torch.tensor(signed, device=counters_N.device).view(-1, 2, 1)
    low_2, high_2 = multiplier_2 & LOW, (multiplier_2 >> 32) & LOW
    even_2N = torch.stack([counters_N, torch.zeros_like(counters_N)])
    odd_2N = torch.zeros_like(even_2N)
    for keys_2 in keys:
        a, b = even_2N & LOW, (even_2N >> 32) & LOW
        middle = a * high_2 + ((a * low_2 >> 32) & LOW)
        upper = b * high_2 + ((middle >> 32) & LOW) + ((b * low_2 + (middle & LOW) >> 32) & LOW)
        even_2N, odd_2N = upper.flip(0) ^ odd_2N ^ keys_2, (even_2N * multiplier_2).flip(0)
    return torch.stack([even_2N, odd_2N], -1).transpose(0, 1).reshape(-1, 4)


def uniform(words: Tensor) -> Tensor:
    """Returns numbers in [-1, 1], in fp32, from random int32."""
    return words.float().add_(0.5).mul_(2.0**-31)


def normal(words: Tensor, std: float) -> Tensor:
    """Returns normal numbers in fp32 from random int32 (N,): the inverse of the distribution, linear between 8192 points.

    Their error is below 1e-6 deviations, and none exceeds 6.4 of these.
    """
    intercepts, slopes = _lines(std, words.device)
    signed = words.float().add_(0.5)
    numbers = signed.abs()
    line = numbers.view(torch.int32).bitwise_right_shift(23 - OCTAVE_BITS).sub_(FIRST_LINE)
    numbers.mul_(slopes.index_select(0, line)).add_(intercepts.index_select(0, line))
    return numbers.copysign_(signed)


OCTAVE_BITS = 8
"""Each octave of magnitudes has 2^8 lines: the tails are as exact as the centre."""
FIRST_LINE = 126 << OCTAVE_BITS
"""The leading bits of 1/2, the least magnitude, in fp32."""


@functools.cache
def _lines(std: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns intercepts and slopes by which a magnitude q, from 1/2 to 2^31, gives the number exceeded with probability q / 2^32.

    The points are multiples of 2^-24, so that the last bits of the host's logarithm, which differ, do not matter.
    """
    steps = 2**OCTAVE_BITS
    magnitudes = [2.0 ** (octave - 1) * (1 + step / steps) for octave in range(32) for step in range(steps)] + [2.0**31]
    points = [round(-NormalDist().inv_cdf(each * 2.0**-32) * 2**24) / 2**24 for each in magnitudes]
    slopes = [(y - x) / (b - a) for (a, b), (x, y) in zip(pairwise(magnitudes), pairwise(points), strict=True)] + [0.0]
    intercepts = [point - slope * each for point, slope, each in zip(points, slopes, magnitudes, strict=True)]
    lines = torch.tensor([intercepts, slopes], dtype=torch.float64, device="cpu").mul_(std)
    intercept, slope = lines.float().to(device)
    return intercept, slope
