"""Which choices an expert of limited capacity keeps (GShard, Switch Transformer).

Dropping by position is causal: whether a choice is kept depends on earlier tokens alone. Dropping by probability is not.
B sequences, S tokens of each, E experts, K choices per token, A = S * K choices of a sequence, T tokens of a scope, G scopes that
this device sees.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from .config import MoEConfig, Scope


class LocalScope:
    """Scopes on a device that holds the whole micro-batch; parallel/scopes.py extends them over ranks."""

    def tokens(self, sequences: int, length: int, scope: Scope) -> int:
        """Returns the number of tokens of a scope, valid or not, if this device has (B, S)."""
        return length if scope is Scope.sequence else sequences * length

    def counts_before(self, counts_BE: Tensor, scope: Scope) -> Tensor:
        """(B, E): the choices in earlier sequences of the same scope; 0 if each sequence is a scope."""
        return torch.zeros_like(counts_BE) if scope is Scope.sequence else counts_BE.cumsum(0) - counts_BE

    def total(self, x_BE: Tensor, scope: Scope) -> Tensor:
        """(G, E): the sum over each scope; G is B or 1."""
        return x_BE if scope is Scope.sequence else x_BE.sum(dim=0, keepdim=True)

    def gather(self, x_BSE: Tensor, scope: Scope) -> Tensor:
        """(G, T, E): all tokens of each scope, in the order they have on one device."""
        return x_BSE if scope is Scope.sequence else x_BSE.flatten(0, 1).unsqueeze(0)

    def local_part(self, x_GTE: Tensor, sequences: int, length: int, scope: Scope) -> Tensor:
        """(B, S, E): the inverse of `gather`; this device's `sequences` of `length` tokens."""
        return x_GTE if scope is Scope.sequence else x_GTE.reshape(sequences, length, x_GTE.shape[2])


def capacity(factor: float, tokens: int, config: MoEConfig) -> int:
    """Returns an expert's rows of a scope: ceil(factor * tokens * K / E), at least capacity.minimum (GShard, section 2.2).

    In exact decimals, since 1.1 * 100 is above 110 in floating point, and a tenth of it would round up to 12.
    """
    columns = config.experts + config.router.null_experts
    return max(config.capacity.minimum, math.ceil(Fraction(str(factor)) * tokens * config.top_k / columns))


def max_rows(rows: int, sequences: int, length: int, scope: Scope) -> int:
    """Returns the most rows that an expert of capacity `rows` can take of (B, S) tokens; padding fills up to it."""
    return sequences * min(rows, length) if scope is Scope.sequence else min(rows, sequences * length)


def keep_earliest(experts_BSK: Tensor, wanted_BSK: Tensor, rows: int, columns: int, scope: Scope, scopes: LocalScope) -> Tensor:
    """(B, S, K): keeps the wanted choices that are among the first `rows` of their expert in the scope."""
    counts_BE = count_choices(experts_BSK, wanted_BSK, columns)
    before_BA = scopes.counts_before(counts_BE, scope).gather(1, experts_BSK.flatten(1))
    positions_BSK = _positions(experts_BSK, wanted_BSK, counts_BE) + before_BA.view_as(experts_BSK)
    return wanted_BSK & (positions_BSK < rows)


def keep_best(experts_BSK: Tensor, wanted_BSK: Tensor, priority_BSE: Tensor, rows: int, scope: Scope, scopes: LocalScope) -> Tensor:
    """(B, S, K): keeps the `rows` wanted choices with the highest priority for their expert in the scope.

    Gathers one number for each token and expert of the scope; in scope batch, of the whole micro-batch.
    """
    wanted_priority_BSK = priority_BSE.gather(-1, experts_BSK).masked_fill(~wanted_BSK, -torch.inf)
    wanted_priority_BSE = torch.full_like(priority_BSE, -torch.inf).scatter(-1, experts_BSK, wanted_priority_BSK)
    return best_of_scope(wanted_priority_BSE, rows, scope, scopes).gather(-1, experts_BSK) & wanted_BSK


def best_of_scope(priority_BSE: Tensor, rows: int, scope: Scope, scopes: LocalScope) -> Tensor:
    """Booleans (B, S, E): the `rows` best tokens of each expert in the scope; of equal ones the earlier, and never -inf.

    Values that differ only by rounding are equal: equal tokens, as where sequences begin alike, must tie on any layout.
    """
    gathered_GTE = round_mantissa(scopes.gather(priority_BSE, scope))
    order_GTE = gathered_GTE.argsort(dim=1, descending=True, stable=True)
    taken_GTE = torch.zeros_like(gathered_GTE, dtype=torch.bool).scatter_(1, order_GTE[:, :rows], True)
    sequences, length, _ = priority_BSE.shape
    return scopes.local_part(taken_GTE & (gathered_GTE > -torch.inf), sequences, length, scope)


def round_mantissa(x: Tensor, kept: int = 16) -> Tensor:
    """Rounds `x` to `kept` significant bits (the splitting of Veltkamp and Dekker, 1971)."""
    spread = x * (2.0 / torch.finfo(x.dtype).eps / 2**kept + 1)
    return torch.where(x.isfinite(), spread - (spread - x), x)


def count_choices(experts_BSK: Tensor, counted_BSK: Tensor | None, columns: int) -> Tensor:
    """int64 (B, E): the number of choices of each expert in each sequence. `counted_BSK` (or (B, S, 1)) masks them; None: all."""
    chosen_BA = experts_BSK.flatten(1)
    counted = True if counted_BSK is None else counted_BSK
    ones_BA = torch.empty_like(chosen_BA)
    ones_BA.view(experts_BSK.shape)[:] = counted  # broadcasts and casts at once
    return chosen_BA.new_zeros(len(chosen_BA), columns).scatter_add_(1, chosen_BA, ones_BA)


def _positions(experts_BSK: Tensor, wanted_BSK: Tensor, counts_BE: Tensor) -> Tensor:
    """(B, S, K): the number of wanted choices of the same expert earlier in the same sequence."""
    experts = counts_BE.shape[1]
    chosen_BA = experts_BSK.flatten(1).masked_fill(~wanted_BSK.flatten(1), experts)
    order_BA = chosen_BA.argsort(dim=1, stable=True)
    starts_BE = counts_BE.cumsum(1) - counts_BE
    starts_BE = torch.cat([starts_BE, counts_BE.sum(1, keepdim=True)], dim=1)
    index_BA = torch.arange(chosen_BA.shape[1], device=chosen_BA.device).expand_as(chosen_BA)
    sorted_position_BA = torch.empty_like(chosen_BA).scatter_(1, order_BA, index_BA)
    return (sorted_position_BA - starts_BE.gather(1, chosen_BA)).view_as(experts_BSK)
