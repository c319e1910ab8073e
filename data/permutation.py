"""Seeded permutations that are the same on every machine and in every version of numpy."""

from functools import lru_cache

import numpy as np
import xxhash


def permutation(size: int, *key: object) -> np.ndarray:
    """The numbers below `size` in an order that depends on `size` and `key` alone; int64."""
    # Sorting raw random bits, because numpy keeps those the same between its versions and Generator.permutation not.
    bits = np.random.Philox(key=xxhash.xxh3_128_intdigest(repr(key).encode()))
    return np.argsort(bits.random_raw(size), kind="stable")


cached_permutation = lru_cache(maxsize=4)(permutation)
"""The same, remembered: for the few large ones of whole corpora."""
