"""Seeded permutations, the same on every machine and in every version of numpy."""

from functools import lru_cache

import numpy as np
import xxhash

SORTED, COMPUTED = 1, 2
"""Orders of the rows of a corpus: by `permutation`, as in checkpoints that do not name theirs, and by `permuted`."""
ROUNDS = 12
"""Of the Feistel network. Four make it pseudorandom (Luby and Rackoff 1988); more, because the halves of small sizes are small."""


def rows_at(positions: np.ndarray, rows: int, order: int, *key: object) -> np.ndarray:
    """Returns the rows, int64, at `positions` of the endless stream of epochs, each of which has every row once.

    Row `order(p % rows)` of epoch `p // rows` is at position p: a permutation of kind `order` by `key` and the epoch.
    """
    epochs, places = np.divmod(positions, rows)
    found = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs):
        found[epochs == epoch] = in_order(places[epochs == epoch], rows, order, *key, int(epoch))
    return found


def in_order(places: np.ndarray, size: int, order: int, *key: object) -> np.ndarray:
    """Returns what is at `places` of the numbers below `size` in the order of kind `order` by `key`."""
    assert order in (SORTED, COMPUTED), f"order {order} is none"
    return permuted(places, size, *key) if order == COMPUTED else _cached_permutation(size, *key)[places]


def permuted(places: np.ndarray, size: int, *key: object) -> np.ndarray:
    """Returns where a permutation of the numbers below `size` puts `places`, int64; it depends on `size` and `key` alone.

    Nothing is kept or made for the other numbers. This is the generalized Feistel network of Black and Rogaway (2002, "Ciphers with
    Arbitrary Finite Domains", method 3): a place is a pair (left, right) below (a, b) with a b >= size > (a - 1) b, of which rounds
    in turn add a function of one to the other, modulo a or b. A result that is not below `size`, at most one in a, is put through
    the network again (cycle walking). The function of a round is SplitMix64's finalizer (Steele, Lea and Flood 2014) of the number
    and the round's key, scaled to the modulus by its upper half.
    """
    found = np.array(places, dtype=np.uint64)
    assert size < 1 << 62 and (found < size).all(), f"{size} numbers have no such place"
    b = max(1, round(size**0.5))
    a = -(-size // b)
    keys = [xxhash.xxh3_64_intdigest(repr((turn, *key)).encode()) for turn in range(ROUNDS)]
    walking = np.ones(found.shape, dtype=bool)
    while walking.any():
        found[walking] = _network(found[walking], np.uint64(a), np.uint64(b), keys)
        walking = found >= size
    return found.astype(np.int64)


def _network(numbers: np.ndarray, a: np.uint64, b: np.uint64, keys: list[int]) -> np.ndarray:
    left, right = np.divmod(numbers, b)
    for turn, key in enumerate(keys):
        if turn % 2:
            right = (right + _function(left, key, b)) % b
        else:
            left = (left + _function(right, key, a)) % a
    return left * b + right


def _function(numbers: np.ndarray, key: int, below: np.uint64) -> np.ndarray:
    mixed = numbers + np.uint64(key)  # modulo 2^64, as the products
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(32)) * below) >> np.uint64(32)


def permutation(size: int, *key: object) -> np.ndarray:
    """Returns all int64 numbers below `size` in an order that depends on `size` and `key` alone: for lists that are in memory."""
    # Sorts raw random bits: numpy promises to keep those between its versions, but not Generator.permutation.
    bits = np.random.Philox(key=xxhash.xxh3_128_intdigest(repr(key).encode()))
    return np.argsort(bits.random_raw(size), kind="stable")


_cached_permutation = lru_cache(maxsize=4)(permutation)
