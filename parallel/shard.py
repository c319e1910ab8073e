"""Which part of a global tensor a rank holds. Checkpoints, initial weights and tests speak of parameters in these terms.

Every layout here cuts tensors into rectangles (a range in each dimension): experts by id, tensor-parallel slices of rows or
columns, FSDP shards inside of those. So one rectangle with its global shape says all there is to know. No torch here.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


class ShardMetadata(NamedTuple):
    """A rectangle of a global tensor: `sizes` elements from `offsets` on, in each dimension of `shape`."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def cut(self, whole: "torch.Tensor") -> "torch.Tensor":
        """The view of the global tensor `whole` (of `shape`) that this piece is."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            whole = whole.narrow(dim, offset, size)
        return whole


class LocalShard(NamedTuple):
    """A piece and this rank's tensor of it, of shape `piece.sizes`."""

    piece: ShardMetadata
    tensor: "torch.Tensor"


def whole(shape: "tuple[int, ...] | torch.Size") -> ShardMetadata:
    """The piece that is everything."""
    return ShardMetadata(tuple(shape), (0,) * len(shape), tuple(shape))


MOST_WORK = 64
"""Looks at a rectangle, on average: layouts cut a tensor along one dimension after the other, which takes one look each."""
MOST_TANGLED = 256
"""Rectangles that no cut separates: each is compared with each."""


class Rectangle(Protocol):
    """`sizes` elements from `offsets` on, in each dimension."""

    @property
    def offsets(self) -> tuple[int, ...]: ...

    @property
    def sizes(self) -> tuple[int, ...]: ...


def apart(rectangles: Sequence[Rectangle]) -> bool:
    """Whether no two of them share an element. None of them is empty. ValueError if they are cut as no layout cuts."""
    left = [list(rectangles)]
    work = MOST_WORK * (len(rectangles) + 64)
    while left:
        group = left.pop()
        parts, looks = _separated(group) if len(group) > 1 else ([], 0)
        work -= looks * len(group)
        if len(parts) > 1:
            left += parts
        elif len({(tuple(one.offsets), tuple(one.sizes)) for one in group}) < len(group):
            return False
        elif work < 0 or len(group) > MOST_TANGLED:
            raise ValueError(f"its {len(rectangles)} chunks are cut as no layout cuts a tensor")
        elif any(overlap(one, other) for one, other in combinations(group, 2)):
            return False
    return True


def overlap(one: Rectangle, other: Rectangle) -> bool:
    """Whether they share an element."""
    spans = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + q and b < a + p for a, p, b, q in spans)


def _separated(group: list[Rectangle]) -> tuple[list[list[Rectangle]], int]:
    """The parts between which a cut across the whole of a dimension goes, of the first that has one; how many were looked at."""
    dims = range(len(group[0].offsets))
    for dim in dims:
        parts = list(_cut(group, dim))
        if len(parts) > 1:
            return parts, dim + 1
    return [group], len(dims)


def _cut(group: list[Rectangle], dim: int) -> Iterator[list[Rectangle]]:
    """Runs of rectangles that reach into each other in this dimension."""
    part: list[Rectangle] = []
    end = 0
    for one in sorted(group, key=lambda one: one.offsets[dim]):
        if part and one.offsets[dim] >= end:
            yield part
            part = []
        end = max(end, one.offsets[dim] + one.sizes[dim]) if part else one.offsets[dim] + one.sizes[dim]
        part.append(one)
    yield part
