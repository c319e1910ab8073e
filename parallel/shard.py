"""Which part of a global tensor a rank holds: used by checkpoints, initial weights and tests. Does not import torch.

Every layout cuts tensors into rectangles (a range in each dimension): experts by id, tensor-parallel slices of rows or columns,
and FSDP shards of those. A rectangle and the global shape therefore describe a shard completely.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class ShardMetadata(NamedTuple):
    """A rectangle of a global tensor of `shape`: in each dimension, `sizes` elements from `offsets` on."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def cut(self, whole: "torch.Tensor") -> "torch.Tensor":
        """Returns this rectangle of the global tensor `whole`, as a view. `whole` may lack leading dimensions."""
        leading = len(self.shape) - whole.ndim
        for dim in range(whole.ndim):
            whole = whole.narrow(dim, self.offsets[leading + dim], self.sizes[leading + dim])
        return whole

    def chunk(self, dim: int, ranks: int, rank: int) -> "ShardMetadata":
        """Returns one of `ranks` chunks in dimension `dim`. Sizes are rounded up, as by torch.chunk: the last may be empty."""
        size = -(-self.sizes[dim] // ranks)
        start = min(rank * size, self.sizes[dim])
        offsets, sizes = list(self.offsets), list(self.sizes)
        offsets[dim], sizes[dim] = offsets[dim] + start, min(size, sizes[dim] - start)
        return ShardMetadata(self.shape, tuple(offsets), tuple(sizes))

    def overlaps(self, other: "ShardMetadata") -> bool:
        """Whether the two share an element."""
        spans = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        return all(a < b + q and b < a + p for a, p, b, q in spans)


class LocalShard(NamedTuple):
    """A shard and this rank's tensor with its values, of shape `metadata.sizes`."""

    metadata: ShardMetadata
    tensor: "torch.Tensor"


def whole(shape: "tuple[int, ...] | torch.Size") -> ShardMetadata:
    """Returns the shard that is the whole tensor."""
    return ShardMetadata(tuple(shape), (0,) * len(shape), tuple(shape))


MAX_COMPARISONS = 64
"""Comparisons per shard, on average: a layout cuts a tensor along one dimension after the other, and each cut needs one."""
MAX_INSEPARABLE = 256
"""Shards that no cut separates; these are compared pairwise."""


def disjoint(shards: Sequence[ShardMetadata]) -> bool:
    """Whether no two of the shards (of one tensor, none empty) share an element.

    Raises ValueError for arrangements that no layout produces and that would take too long to check.
    """
    groups = [list(shards)]
    budget = MAX_COMPARISONS * (len(shards) + 64)
    while groups:
        group = groups.pop()
        parts, dims = _separate(group) if len(group) > 1 else ([], 0)
        budget -= dims * len(group)
        if len(parts) > 1:
            groups += parts
        elif len({(shard.offsets, shard.sizes) for shard in group}) < len(group):
            return False
        elif budget < 0 or len(group) > MAX_INSEPARABLE:
            raise ValueError(f"its {len(shards)} chunks are cut as no layout cuts a tensor")
        elif any(one.overlaps(other) for one, other in combinations(group, 2)):
            return False
    return True


def _separate(group: list[ShardMetadata]) -> tuple[list[list[ShardMetadata]], int]:
    """Splits the group along the first dimension that allows it. Returns the parts, and how many dimensions were tried."""
    dims = range(len(group[0].offsets))
    for dim in dims:
        parts = list(_split(group, dim))
        if len(parts) > 1:
            return parts, dim + 1
    return [group], len(dims)


def _split(group: list[ShardMetadata], dim: int) -> Iterator[list[ShardMetadata]]:
    """Yields runs of shards whose ranges in `dim` overlap."""
    part: list[ShardMetadata] = []
    end = 0
    for shard in sorted(group, key=lambda shard: shard.offsets[dim]):
        if part and shard.offsets[dim] >= end:
            yield part
            part = []
        end = max(end, shard.offsets[dim] + shard.sizes[dim]) if part else shard.offsets[dim] + shard.sizes[dim]
        part.append(shard)
    yield part
