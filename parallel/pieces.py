"""Which part of a global tensor a rank holds. Checkpoints, initial weights and tests speak of parameters in these terms.

Every layout here cuts tensors into rectangles (a range in each dimension): experts by id, tensor-parallel slices of rows or
columns, FSDP shards inside of those. So one rectangle with its global shape says all there is to know.
"""

from typing import NamedTuple

import torch


class Piece(NamedTuple):
    """A rectangle of a global tensor: `sizes` elements from `offsets` on, in each dimension of `shape`."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The view of the global tensor `whole` (of `shape`) that this piece is."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            whole = whole.narrow(dim, offset, size)
        return whole


class Held(NamedTuple):
    """A piece and this rank's tensor of it, of shape `piece.sizes`."""

    piece: Piece
    tensor: torch.Tensor


def whole(shape: tuple[int, ...] | torch.Size) -> Piece:
    """The piece that is everything."""
    return Piece(tuple(shape), (0,) * len(shape), tuple(shape))
