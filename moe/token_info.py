"""Per-token information for the router: validity, ids and random keys; and documents inside a sequence.

B sequences, S tokens of each.
"""

import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

# Stateless random numbers: each is a pure function of its key, so it does not depend on layout, recomputation or accumulation.
#
# Keys are int64, mixed as splitmix64 mixes its counter (Steele et al. 2014), modulo 2**64: the same bits on every device.


class Purpose(IntEnum):
    """What a random number is used for; numbers for different purposes are independent."""

    jitter = 1
    radius = 2
    angle = 3
    second_expert = 4
    drop = 5
    hash = 6
    embedding_dropout = 7
    attention_dropout = 8
    feedforward_dropout = 9
    hidden_dropout = 10
    output_dropout = 11


def random_uniform(key: Tensor, columns: int, purpose: Purpose) -> Tensor:
    """Returns uniform fp64 numbers in (0, 1), shape (..., columns), for int64 keys of shape (...)."""
    bits = fold_in(fold_in(key, purpose).unsqueeze(-1), torch.arange(columns, device=key.device))
    return (_shift_right(bits, 12).double() + 0.5) * 2.0**-52  # exact: 52 bits and a half


def random_normal(key: Tensor, columns: int) -> Tensor:
    """Returns normal fp64 numbers of mean 0 and variance 1, shape (..., columns) (Box and Muller 1958)."""
    radius = (-2 * random_uniform(key, columns, Purpose.radius).log()).sqrt()
    return radius * (2 * math.pi * random_uniform(key, columns, Purpose.angle)).cos()


def fold_in(key: Tensor, value: Tensor | int) -> Tensor:
    """Returns a new int64 key from a key and a number, which broadcast."""
    mixed = key * (0x9E3779B97F4A7C15 - 2**64) + value  # the constants as signed int64
    mixed = (mixed ^ _shift_right(mixed, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    mixed = (mixed ^ _shift_right(mixed, 27)) * (0x94D049BB133111EB - 2**64)
    return mixed ^ _shift_right(mixed, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Shifts logically; torch's shift copies the sign bit."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


class BatchPosition(NamedTuple):
    """The position of a micro-batch of this rank in the run; by default the first row of the first step."""

    seed: int = 0
    """Seed of the run."""
    step: int = 1
    """Optimizer step; the first is 1."""
    row: int = 0
    """Index in the global batch of this rank's first row; its other rows follow."""


class TokenInfo(NamedTuple):
    """Tensors are (B, S), or a slice of that under tensor parallelism. All MoE layers share it but for `layer`."""

    valid_BS: Tensor | None = None
    """Tokens that count in statistics and capacity; None: all."""
    ids_BS: Tensor | None = None
    """Token ids, for hash selection."""
    keys_BS: Tensor | None = None
    """int64 random keys, unique in a run: a function of (seed, step, global row, position); None: no randomness."""
    step: int = 1
    """Optimizer step, for schedules; the first is 1."""
    layer: int = 0
    """Index of the layer."""


def build_token_info(ids_BS: Tensor, valid_BS: Tensor | None, position: BatchPosition | None, is_random: bool = True) -> TokenInfo:
    """Returns the information of whole sequences. `position` is None outside training; `is_random`: random numbers are drawn."""
    if position is None:
        return TokenInfo(valid_BS, ids_BS)
    keys_BS = token_keys(position, len(ids_BS), ids_BS.shape[1], ids_BS.device) if is_random else None
    return TokenInfo(valid_BS, ids_BS, keys_BS, position.step)


def token_keys(position: BatchPosition, sequences: int, length: int, device: torch.device) -> Tensor:
    """int64 (B, S): the random key of each token."""
    step = fold_in(torch.full((1, 1), position.seed, dtype=torch.int64, device=device), position.step)
    rows_B1 = position.row + torch.arange(sequences, device=device).unsqueeze(1)
    return fold_in(fold_in(step, rows_B1), torch.arange(length, device=device))


def layer_keys(x_BSD: Tensor, tokens: TokenInfo) -> Tensor:
    """int64 (B, S): the random keys of these tokens in this layer; by default those of the run's first rows."""
    keys_BS = tokens.keys_BS
    if keys_BS is None:
        keys_BS = token_keys(BatchPosition(), x_BSD.shape[0], x_BSD.shape[1], x_BSD.device)
    return fold_in(keys_BS, tokens.layer)


# Several documents in one sequence: attention stays inside each of them and positions restart. B sequences, S tokens.


def documents_of(ids_BS: Tensor, targets_BS: Tensor, end: int, ignore: int) -> tuple[Tensor, Tensor]:
    """Returns the index of each token's document in its sequence, int64 (B, S), and the targets without first tokens of documents.

    `end` is the id of the end-of-document token, which belongs to the document that it ends; first tokens become `ignore`.
    """
    ends_BS = ids_BS == end
    return ends_BS.cumsum(1) - ends_BS.long(), targets_BS.masked_fill(ends_BS, ignore)


def positions_of(documents_BS: Tensor) -> Tensor:
    """int64 (B, S): the position of each token in its document, from 0 (or from the start of the sequence, if it began before)."""
    positions_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    return positions_S - torch.where(begins_BS, positions_S, 0).cummax(1).values


def lengths_of(documents_BS: Tensor) -> Tensor:
    """int64 (B, S): the number of tokens that the document of each token has in its sequence."""
    backwards_BS = positions_of(documents_BS.flip(1)).flip(1)
    return positions_of(documents_BS) + backwards_BS + 1


def same_document(documents_BT: Tensor, new: int) -> Tensor:
    """Booleans (B, 1, new, T): which of T tokens are in the document of each of the last `new`."""
    return (documents_BT[:, -new:, None] == documents_BT[:, None, :]).unsqueeze(1)
