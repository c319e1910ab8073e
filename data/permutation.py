"""Seeded permutations, the same on every machine and in every version of numpy."""

from functools import lru_cache

import numpy as np
import xxhash


def permutation(size: int, *key: object) -> np.ndarray:
    """Returns the int64 numbers below `size` in an order that depends on `size` and `key` alone."""
    # Sorts raw random bits: numpy promises to keep those between its versions, but not Generator.permutation.
    bits = np.random.Philox(key=xxhash.xxh3_128_intdigest(repr(key).encode()))
    return np.argsort(bits.random_raw(size), kind="stable")


cached_permutation = lru_cache(maxsize=4)(permutation)
"""Like `permutation`, with a cache for the few large ones of whole corpora."""
