"""What a router may know about tokens beside their vectors: which count, what they are, and where in the run they stand.

B sequences, S tokens of each.
"""

import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

# Random numbers without a generator: each is a pure function of what it is for.
#
# So they depend neither on the layout nor on recomputation nor on accumulation. Keys are int64 and are mixed as splitmix64
# mixes its counter (Steele et al. 2014); all arithmetic is modulo 2**64 and gives the same bits on every device.


class Purpose(IntEnum):
    """What a number is for; different purposes are independent."""

    jitter = 1
    radius = 2
    angle = 3
    second_expert = 4
    drop = 5
    hash = 6


def uniform(key: Tensor, columns: int, purpose: Purpose) -> Tensor:
    """fp64 (..., columns) inside of (0, 1), for int64 keys of shape (...)."""
    bits = fold_in(fold_in(key, purpose).unsqueeze(-1), torch.arange(columns, device=key.device))
    return (_shift_right(bits, 12).double() + 0.5) * 2.0**-52  # exact: 52 bits and a half


def normal(key: Tensor, columns: int) -> Tensor:
    """fp64 (..., columns) of mean 0 and variance 1 (Box and Muller 1958)."""
    radius = (-2 * uniform(key, columns, Purpose.radius).log()).sqrt()
    return radius * (2 * math.pi * uniform(key, columns, Purpose.angle)).cos()


def fold_in(key: Tensor, value: Tensor | int) -> Tensor:
    """A new int64 key from a key and a number; the two broadcast."""
    mixed = key * _signed(0x9E3779B97F4A7C15) + value
    mixed = (mixed ^ _shift_right(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shift_right(mixed, 27)) * _signed(0x94D049BB133111EB)
    return mixed ^ _shift_right(mixed, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Without the sign, which torch would shift in."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64)


class BatchPosition(NamedTuple):
    """Where a micro-batch of this rank stands in the run. The first row of a device alone, if nothing else is known."""

    seed: int = 0
    """The run's seed."""
    step: int = 1
    """Optimizer step; the first is 1."""
    row: int = 0
    """Row of the global batch that is this rank's first; the others follow."""


class TokenInfo(NamedTuple):
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


def describe(ids_BS: Tensor, valid_BS: Tensor | None, place: BatchPosition | None, draws: bool = True) -> TokenInfo:
    """The record of whole sequences; `place` is None outside training, and `draws` False where no layer draws random numbers."""
    if place is None:
        return TokenInfo(valid_BS, ids_BS)
    place_BS = places(place, len(ids_BS), ids_BS.shape[1], ids_BS.device) if draws else None
    return TokenInfo(valid_BS, ids_BS, place_BS, place.step)


def places(place: BatchPosition, sequences: int, length: int, device: torch.device) -> Tensor:
    """int64 (B, S): the keys of all randomness of these tokens."""
    step = fold_in(torch.full((1, 1), place.seed, dtype=torch.int64, device=device), place.step)
    rows_B1 = place.row + torch.arange(sequences, device=device).unsqueeze(1)
    return fold_in(fold_in(step, rows_B1), torch.arange(length, device=device))


# Several documents in one sequence: attention that stays inside of each, with positions that restart. B sequences, S tokens.


def documents_of(ids_BS: Tensor, targets_BS: Tensor, end: int, ignore: int = -100) -> tuple[Tensor, Tensor]:
    """Which document of its sequence each token is of, int64 (B, S), and the targets without those that begin a document.

    `end` is the id of the mark that ends a document and belongs to it.
    """
    ends_BS = ids_BS == end
    return ends_BS.cumsum(1) - ends_BS.long(), targets_BS.masked_fill(ends_BS, ignore)


def positions_of(documents_BS: Tensor) -> Tensor:
    """int64 (B, S): the place of each token in its document, from 0; the first of a sequence may be cut off in front."""
    places_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    return places_S - torch.where(begins_BS, places_S, 0).cummax(1).values


def same_document(documents_BS: Tensor) -> Tensor:
    """Booleans (B, 1, S, S): which tokens are of one document."""
    return (documents_BS[:, :, None] == documents_BS[:, None, :]).unsqueeze(1)
