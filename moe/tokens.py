"""What a router may know about tokens beside their vectors: which count, what they are, and where in the run they stand.

B sequences, S tokens of each.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .noise import fold


class Place(NamedTuple):
    """Where a micro-batch of this rank stands in the run. The first row of a device alone, if nothing else is known."""

    seed: int = 0
    """The run's seed."""
    step: int = 1
    """Optimizer step; the first is 1."""
    row: int = 0
    """Row of the global batch that is this rank's first; the others follow."""


class Tokens(NamedTuple):
    """One record for all MoE layers. Every tensor is (B, S), or a slice of it under tensor parallelism."""

    valid_BS: Tensor | None = None
    """Tokens that are counted; None: all."""
    ids_BS: Tensor | None = None
    """Token ids, which hash selection needs."""
    place_BS: Tensor | None = None
    """int64: differs for every token of a run and depends on (seed, step, global row, position) alone; None: nothing is random."""
    step: int = 1
    """Optimizer step, for schedules; the first is 1."""
    layer: int = 0
    """Index of the layer."""


def describe(ids_BS: Tensor, valid_BS: Tensor | None, place: Place | None, draws: bool = True) -> Tokens:
    """The record of whole sequences; `place` is None outside training, and `draws` False where no layer draws random numbers."""
    if place is None:
        return Tokens(valid_BS, ids_BS)
    place_BS = places(place, len(ids_BS), ids_BS.shape[1], ids_BS.device) if draws else None
    return Tokens(valid_BS, ids_BS, place_BS, place.step)


def places(place: Place, sequences: int, length: int, device: torch.device) -> Tensor:
    """int64 (B, S): the keys of all randomness of these tokens."""
    step = fold(torch.full((1, 1), place.seed, dtype=torch.int64, device=device), place.step)
    rows_B1 = place.row + torch.arange(sequences, device=device).unsqueeze(1)
    return fold(fold(step, rows_B1), torch.arange(length, device=device))
