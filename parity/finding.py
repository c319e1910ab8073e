"""What parity speaks of: the names of tensors, the kinds there are, and what a rank found about one. No torch."""

from typing import NamedTuple


class Key(NamedTuple):
    """The name of a global tensor."""

    step: int
    """The first is 1."""
    kind: str
    """One of KINDS."""
    name: str
    """Of the parameter or of the module."""


KINDS = {
    "output": "outputs",
    "count per expert": "counts",
    "dropped": "counts",
    "balance loss": "losses",
    "sequence balance loss": "losses",
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
"""What is compared, in the order of computation, and the column of the table that it belongs to."""


class Finding(NamedTuple):
    """How a rank's piece of a tensor compares with the same piece of one process. Numbers and text only."""

    step: int
    kind: str
    name: str
    shape: list[int]
    offsets: list[int]
    sizes: list[int]
    difference: float
    """Largest difference, relative to the global tensor's largest element."""
    digest: str
    """Of the bits: copies must be alike."""
    ratio: float | None = None
    """The piece is exactly so many times that of one process."""
    auxiliary: float | None = None
    """The gradient is exactly that of one process if the auxiliary losses count so many times."""
