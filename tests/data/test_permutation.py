"""Every order of rows is a permutation, the same everywhere, and as random as a uniform one."""

import json
import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import xxhash
from tokenyard.data.batches import GlobalBatches, ValidationBatches
from tokenyard.data.permutation import COMPUTED, SORTED, permutation, permuted, rows_at
from tokenyard.data.token_array import TokenArray, TokensManifest

EDGES = [size + more for size in (2**10, 2**12, 2**15, 2**16, 316**2, 99_856) for more in (-1, 0, 1)]
PRIMES = [997, 4_099, 65_537, 99_991]


def of(size: int, *key: object) -> np.ndarray:
    return permuted(np.arange(size), size, *key)


@pytest.mark.parametrize("sizes", [range(1, 500), [*EDGES, *PRIMES, 100_000]], ids=["small", "edges and primes"])
def test_each_number_once(sizes: list[int] | range) -> None:
    for size in sizes:
        assert np.array_equal(np.sort(of(size, "k", size)), np.arange(size)), size


def test_a_place_does_not_depend_on_the_others() -> None:
    whole = of(10_007, "k")
    places = np.array([9_999, 0, 3, 3, 10_006])
    assert np.array_equal(permuted(places, 10_007, "k"), whole[places])
    assert all(permuted(np.array([place]), 10_007, "k")[0] == whole[place] for place in (0, 5_000, 10_006))
    with pytest.raises(AssertionError):
        permuted(np.array([10_007]), 10_007, "k")


def by_hand(place: int, size: int, *key: object) -> int:
    """The network of Black and Rogaway, a number at a time in Python's own integers."""
    b = max(1, round(math.sqrt(size)))
    a = math.ceil(size / b)
    while True:
        pair = [place // b, place % b]
        for turn in range(12):
            x = (pair[1 - turn % 2] + xxhash.xxh3_64_intdigest(repr((turn, *key)).encode())) % 2**64
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
            modulus = (a, b)[turn % 2]
            pair[turn % 2] = (pair[turn % 2] + ((x ^ x >> 31) >> 32) * modulus // 2**32) % modulus
        place = pair[0] * b + pair[1]
        if place < size:
            return place


def test_the_network_of_the_paper() -> None:
    for size in (1, 2, 3, 13, 1_000, 99_991):
        assert of(size, "paper", 1)[:50].tolist() == [by_hand(place, size, "paper", 1) for place in range(min(50, size))]


def test_golden_values() -> None:
    """Integers only, so the same on all machines; another order would break the resume of running experiments."""
    assert of(13, "golden").tolist() == [5, 0, 8, 6, 1, 4, 7, 9, 12, 3, 2, 10, 11]
    far = permuted(np.array([0, 1, 123_456_789, 244_140_624]), 244_140_625, "train", "f", 1, 0)
    assert far.tolist() == [72262498, 45648317, 187958266, 4030802]


def test_another_process_and_a_small_memory() -> None:
    """Rows of 10^15 are found without memory for them."""
    code = (
        "import numpy as np; from tokenyard.data.permutation import permuted; print(permuted(np.arange(3), 10**15, 'k').tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == permuted(np.arange(3), 10**15, "k").tolist()


# Against a uniform permutation: each statistic has a known mean and variance there; Z is the distance in standard deviations.

Z = 4.5
"""About 1 in 150,000 for one statistic; the tests below look at some 60."""


def chi_square(counts: np.ndarray, expected: float) -> float:
    """Pearson's statistic as standard deviations from its mean, by Wilson and Hilferty's cube root."""
    value, freedom = float(((counts - expected) ** 2 / expected).sum()), counts.size - 1
    return ((value / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize("size", [3, 5, 8, 12, 50])
def test_pairs_of_places_over_keys(size: int) -> None:
    """Where two neighbours, and both ends, go together: each ordered pair as often."""
    found = np.stack([of(size, "pairs", key) for key in range(6_000)])
    for one, other in ((0, 1), (size // 2, size // 2 - 1), (0, size - 1)):
        counts = np.bincount(found[:, one] * size + found[:, other], minlength=size * size).reshape(size, size)
        assert abs(chi_square(counts[~np.eye(size, dtype=bool)], len(found) / (size * (size - 1)))) < Z
    fixed = (found == np.arange(size)).sum(axis=1)  # mean 1, variance 1
    assert abs(fixed.mean() - 1) < Z / math.sqrt(len(found))


@pytest.mark.parametrize("size", [1_009, 65_536, 99_991])
def test_one_order_is_like_a_uniform_one(size: int) -> None:
    for key in range(3):
        order = of(size, "quality", key).astype(np.float64)
        unit = (order - (size - 1) / 2) / math.sqrt((size * size - 1) / 12)
        for lag in (1, 2, 64, math.isqrt(size)):  # serial correlation: mean about -1, variance about n
            assert abs((unit[:-lag] * unit[lag:]).sum() + 1) < Z * math.sqrt(size), lag
        moved = np.abs(order - np.arange(size)).mean()  # mean (n^2 - 1) / 3n, variance of the mean about 2n / 45
        assert abs(moved - (size * size - 1) / (3 * size)) < Z * math.sqrt(2 * size / 45)
        assert (order == np.arange(size)).sum() < 10  # Poisson with mean 1: 1 in 9 million
        places = np.arange(size) * 16 // size * 16 + order.astype(np.int64) * 16 // size
        assert abs(chi_square(np.bincount(places, minlength=256), size / 256)) < Z
        runs = (np.diff(order) > 0).sum()  # ascents: mean (n - 1) / 2, variance (n + 1) / 12
        assert abs(runs - (size - 1) / 2) < Z * math.sqrt((size + 1) / 12)


def test_seeds_and_epochs_are_independent() -> None:
    size = 30_011
    orders = [of(size, "train", "f", seed, epoch) for seed in (1, 2) for epoch in (0, 1, 2)]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert (one == other).sum() < 10 and abs(np.corrcoef(one, other)[0, 1]) < Z / math.sqrt(size)
            steps = np.bincount((one - other) % size * 64 // size, minlength=64)
            assert abs(chi_square(steps, size / 64)) < Z


# The orders of a run.


def test_epochs_follow_each_other() -> None:
    rows = rows_at(np.arange(95), 19, COMPUTED, "k")
    epochs = rows.reshape(5, 19)
    assert np.array_equal(np.sort(epochs), np.tile(np.arange(19), (5, 1)))
    assert all(not np.array_equal(one, other) for one, other in pairwise(epochs))
    assert np.array_equal(rows_at(np.arange(95), 19, SORTED, "k")[19:38], permutation(19, "k", 1))


def test_a_run_of_an_earlier_version_keeps_its_order() -> None:
    """Its checkpoint names no order: rows to train on and to validate on stay those of `permutation`."""
    ids = np.arange(50 * 8 + 1, dtype=np.uint16)
    tokens = TokenArray(ids, TokensManifest(1, len(ids), 0, [], 0, 0, "f"))
    train, validation = GlobalBatches(tokens, seed=1, sequences=16, sequence_length=8), ValidationBatches(tokens, sequence_length=8)
    new = train.batch(0).ids_BS[:, 0] // 8
    before = next(validation.batches(50, 50)).ids_BS[:, 0] // 8
    assert new.tolist() == permuted(np.arange(16), 50, "train", "f", 1, 0).tolist()
    for each in (train, validation):
        each.restore({})
    assert (train.batch(0).ids_BS[:, 0] // 8).tolist() == permutation(50, "train", "f", 1, 0)[:16].tolist() != new.tolist()
    after = next(validation.batches(50, 50)).ids_BS[:, 0] // 8
    assert after.tolist() == permutation(50, "validation", "f").tolist() != before.tolist()
    assert train.state(7) == {"order": SORTED}
    train.restore({"order": COMPUTED})
    assert (train.batch(0).ids_BS[:, 0] // 8).tolist() == new.tolist()
