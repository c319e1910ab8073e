"""The names and kinds of the tensors that parity compares, and the finding of a rank about one. Needs no torch."""

from typing import NamedTuple


class Key(NamedTuple):
    """The name of a global tensor."""

    step: int
    """The first is 1."""
    kind: str
    """One of KINDS."""
    name: str
    """The name of the parameter or module."""


KINDS = {
    "output": "outputs",
    "count per expert": "counts",
    "dropped": "counts",
    "balance loss": "losses",
    "sequence balance loss": "losses",
    "device balance loss": "losses",
    "communication balance loss": "losses",
    "importance loss": "losses",
    "z-loss": "losses",
    "cross entropy": "losses",
    "mtp cross entropy": "losses",
    "tokens": "counts",
    "gradient": "gradients",
    "gradient norm": "norm",
    "weight": "weights",
    "expert bias": "weights",
}
"""The kinds of tensors in the order of computation, and the table column of each."""


class Finding(NamedTuple):
    """The comparison of a rank's shard of a tensor with the same shard of one process. Numbers and text only."""

    step: int
    kind: str
    name: str
    shape: list[int]
    offsets: list[int]
    sizes: list[int]
    difference: float
    """The largest difference, relative to the largest element of the global tensor."""
    digest: str
    """A hash of the bits, which must be equal for copies."""
    ratio: float | None = None
    """The factor by which the shard differs from that of one process, if it is exact."""
    auxiliary: float | None = None
    """The factor by which the part of the auxiliary losses in a gradient differs, if it is exact."""
