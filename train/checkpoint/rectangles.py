"""Rectangles of tensors, of whatever class has `offsets` and `sizes`."""

from collections.abc import Sequence
from typing import Protocol


class Rectangle(Protocol):
    """`sizes` elements from `offsets` on, in each dimension."""

    @property
    def offsets(self) -> tuple[int, ...]: ...

    @property
    def sizes(self) -> tuple[int, ...]: ...


def apart(rectangles: Sequence[Rectangle]) -> bool:
    """Whether no two of them share an element. None of them is empty."""
    if len(rectangles) < 2:
        return True
    dims = range(len(rectangles[0].offsets))
    if not dims:
        return False
    # Sorted in the dimension with the most different offsets, each is compared with those that begin before it ends.
    dim = max(dims, key=lambda d: len({one.offsets[d] for one in rectangles}))
    ordered = sorted(rectangles, key=lambda one: one.offsets[dim])
    for index, one in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if other.offsets[dim] >= one.offsets[dim] + one.sizes[dim]:
                break
            if overlap(one, other):
                return False
    return True


def overlap(one: Rectangle, other: Rectangle) -> bool:
    """Whether they share an element."""
    spans = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + q and b < a + p for a, p, b, q in spans)
