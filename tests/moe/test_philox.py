"""Random numbers by position: compared with numpy's generator, with the whole tensor, and with the normal distribution."""

import hashlib
import math
import random
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from tokenyard.moe import philox
from tokenyard.moe.philox import LANES, normal, random_words, uniform, words_of_rectangle
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
KEY = (0xFEDCBA9876543210, 0x0123456789ABCDEF)
SAMPLES = 2**20


@pytest.mark.parametrize("first", [0, 1, 2**32 - 3, 2**40 + 7])
def test_operators_make_the_words_of_numpys_generator(first: int) -> None:
    expected = np.random.Philox(key=np.array(KEY, np.uint64), counter=first).random_raw(4 * 50).view(np.int32)
    found = philox.philox(KEY, torch.arange(first + 1, first + 51)).view(torch.int32)
    assert found.flatten().tolist() == expected.tolist()


def test_runs_of_blocks_are_the_same_from_numpy_and_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs may overlap, and be far apart."""
    first_R = torch.tensor([0, 39, 70, 2**36, 2**36 + 40])
    by_numpy = random_words(KEY, first_R, 40, CPU)
    monkeypatch.setattr(philox, "HOST_BLOCKS", 41)
    assert torch.equal(by_numpy, random_words(KEY, first_R, 40, CPU))
    assert torch.equal(by_numpy[0, 39 * LANES :], by_numpy[1, :LANES]), "two runs have one block in common"


@pytest.mark.parametrize("shape", [(40, 64), (7, 5, 9), (3, 2, 33, 65), (1000,), (6, 1, 48)])
def test_a_rectangle_has_the_words_of_the_whole(shape: tuple[int, ...]) -> None:
    """With any offsets and sizes."""
    everything = words_of_rectangle("key", shape, [0] * len(shape), shape, CPU).view(shape)
    choose = random.Random(1)
    for _ in range(40):
        ends = [sorted(choose.sample(range(size + 1), 2)) for size in shape]
        offsets, sizes = [begin for begin, _ in ends], [end - begin for begin, end in ends]
        expected = everything[tuple(slice(*pair) for pair in ends)]
        assert torch.equal(words_of_rectangle("key", shape, offsets, sizes, CPU), expected.flatten())


def test_numbers_are_the_inverse_of_the_normal_distribution() -> None:
    """From the least magnitude to the largest, and in each octave: within 1e-6."""
    magnitudes = sorted({0, *(2**k + d for k in range(31) for d in (-1, 0, 1)), *(int(1.07**k) for k in range(316)), 2**31 - 1})
    words = [word for magnitude in magnitudes for word in (magnitude, -magnitude - 1)]
    found = normal(torch.tensor(words, dtype=torch.int32), 1.0).double()
    expected = [math.copysign(-NormalDist().inv_cdf(abs(word + 0.5) / 2**32), word + 0.5) for word in words]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_deviation_scales() -> None:
    words = random_words(KEY, torch.tensor([0]), 64, CPU).flatten()
    torch.testing.assert_close(normal(words, 0.02), normal(words, 1.0) * 0.02, rtol=1e-4, atol=1e-8)


def test_points_do_not_depend_on_the_last_bits_of_the_hosts_logarithm() -> None:
    """None is within 1e-13 of where its rounding to 2^-24 would change; two logarithms differ by 1e-15."""
    steps = 2**philox.OCTAVE_BITS
    chances = [2.0 ** (octave - 33) * (1 + step / steps) for octave in range(32) for step in range(steps)]
    scaled = [NormalDist().inv_cdf(chance) * 2**24 for chance in chances]
    assert min(abs(value - math.floor(value) - 0.5) for value in scaled) > 1e-13 * 2**24


def test_moments_and_distribution() -> None:
    """Of 2^20 numbers: moments to the fourth within 4 standard errors, the Kolmogorov-Smirnov statistic below its 0.1 % limit."""
    numbers = drawn("a")
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((numbers**power).mean().item() - mean) < 4 * math.sqrt(variance / SAMPLES), power
    distances = torch.special.ndtr(numbers.sort().values) - torch.arange(SAMPLES, dtype=torch.float64) / SAMPLES
    assert distances.abs().max().item() < 1.95 / math.sqrt(SAMPLES)
    assert 4.4 < numbers.abs().max().item() < 6.4
    assert len(numbers.unique()) > 0.97 * SAMPLES, "numbers of 32 bits seldom meet in fp32"


def test_neighbours_and_keys_are_not_correlated() -> None:
    """Products of numbers and of their squares have mean zero within 4 standard errors."""
    numbers = drawn("1/layers.0.q")
    others = [numbers.roll(lag) for lag in (1, 2, 3, 4, 7, 8, 16, 64, 1024)]
    others += [drawn(key) for key in ("1/layers.1.q", "1/layers.0.k", "2/layers.0.q")]
    for other in others:
        assert abs((numbers * other).mean().item()) < 4 / math.sqrt(SAMPLES)
        assert abs(((numbers**2 - 1) * (other**2 - 1)).mean().item()) < 8 / math.sqrt(SAMPLES)


def test_numbers_never_change() -> None:
    """On every machine and device, in every version. Found by this code; the words under them are numpy's."""
    words = words_of_rectangle("1/layers.0.attention.q.weight", (1024, 1024), (1, 0), (64, 1024), CPU)
    assert words[:4].tolist() == [907414741, 6957852, 1117503957, 609606676]
    digests = [hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16] for values in (normal(words, 0.02), uniform(words))]
    assert digests == ["4fab80745279c5bd", "e4df057106f25c27"]


EXACT = {
    *("add", "add_", "sub_", "mul", "mul_", "abs", "copysign_", "__and__", "bitwise_and", "__xor__", "bitwise_xor"),
    *("__rshift__", "bitwise_right_shift", "bitwise_right_shift_", "index_select", "_to_copy", "arange", "stack", "zeros_like"),
    *("flip", "transpose", "view", "_unsafe_view", "clone", "unbind", "detach", "alias", "select", "unsqueeze", "lift_fresh"),
}
"""Operators of integers, of bits and of IEEE 754, which every device rounds alike, and copies."""


def test_operators_are_those_that_every_device_rounds_alike() -> None:
    """None is a function whose last bit differs between devices, and none could be a product and a sum with one rounding."""
    normal(torch.zeros(8, dtype=torch.int32), 1.0)  # the table is made on the host
    seen = Operators()
    with seen:
        words = philox.philox(KEY, torch.arange(5)).view(torch.int32).flatten()
        normal(words, 1.0)
        uniform(words)
    assert seen.names <= EXACT, seen.names - EXACT
    assert {"mul_", "add_", "index_select"} <= seen.names


class Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        if "add" in func.overloadpacket.__name__:
            assert (kwargs or {}).get("alpha", 1) == 1
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_bits_of_a_cpu() -> None:
    shape, offsets, sizes = (8, 300, 64), (2, 3, 8), (4, 200, 40)
    words = [words_of_rectangle("key", shape, offsets, sizes, torch.device(device)) for device in ("cpu", "cuda")]
    assert torch.equal(words[0], words[1].cpu())
    assert torch.equal(normal(words[0], 0.02), normal(words[1], 0.02).cpu())
    assert torch.equal(uniform(words[0]), uniform(words[1]).cpu())


def drawn(key: str) -> Tensor:
    return normal(words_of_rectangle(key, (SAMPLES,), (0,), (SAMPLES,), CPU), 1.0).double()
