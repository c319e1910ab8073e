"""Which choices an expert of limited capacity keeps (GShard, Switch Transformer).

By position a token's fate depends on earlier tokens alone; by probability it does not. B sequences, S tokens of each, E experts,
K choices per token, A = S * K choices of a sequence, T tokens of a scope, G scopes that this device sees.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from .config import MoEConfig, Scope


class LocalScope:
    """The surroundings of a device that holds the whole micro-batch. parallel/scopes.py has those of a rank."""

    def tokens(self, sequences: int, length: int, scope: Scope) -> int:
        """Tokens of a scope, valid or not, where this device has (B, S)."""
        return length if scope is Scope.sequence else sequences * length

    def ahead(self, counts_BE: Tensor, scope: Scope) -> Tensor:
        """(B, E) choices ahead of each sequence: none where sequences have their own scope, else those of the earlier ones."""
        return torch.zeros_like(counts_BE) if scope is Scope.sequence else counts_BE.cumsum(0) - counts_BE

    def total(self, x_BE: Tensor, scope: Scope) -> Tensor:
        """(G, E): sums over each scope; G is B or 1."""
        return x_BE if scope is Scope.sequence else x_BE.sum(dim=0, keepdim=True)

    def gather(self, x_BSE: Tensor, scope: Scope) -> Tensor:
        """(G, T, E): all tokens of each scope in the order of one device."""
        return x_BSE if scope is Scope.sequence else x_BSE.flatten(0, 1).unsqueeze(0)

    def own(self, x_GTE: Tensor, sequences: int, length: int, scope: Scope) -> Tensor:
        """(B, S, E): this device's part, `sequences` of `length` tokens, of what `gather` gave."""
        return x_GTE if scope is Scope.sequence else x_GTE.reshape(sequences, length, x_GTE.shape[2])


def capacity(factor: float, tokens: int, config: MoEConfig) -> int:
    """Rows that an expert takes of a scope: ceil(factor * tokens * K / E), at least capacity.minimum (GShard, section 2.2).

    In exact decimals: the float product of 1.1 and 100 is above 110, and its tenth would round up to 12.
    """
    columns = config.experts + config.router.null_experts
    return max(config.capacity.minimum, math.ceil(Fraction(str(factor)) * tokens * config.top_k / columns))


def most_rows(rows: int, sequences: int, length: int, scope: Scope) -> int:
    """The most that an expert with that capacity can take of a device's (B, S) tokens; padding fills up to it."""
    return sequences * min(rows, length) if scope is Scope.sequence else min(rows, sequences * length)


def keep_earliest(
    experts_BSK: Tensor, wanted_BSK: Tensor, rows: int, columns: int, scope: Scope, surroundings: LocalScope
) -> Tensor:
    """(B, S, K): of the wanted choices those that are the first `rows` of their expert in the scope."""
    counts_BE = count_choices(experts_BSK, wanted_BSK, columns)
    ahead_BA = surroundings.ahead(counts_BE, scope).gather(1, experts_BSK.flatten(1))
    places_BSK = _places(experts_BSK, wanted_BSK, counts_BE) + ahead_BA.view_as(experts_BSK)
    return wanted_BSK & (places_BSK < rows)


def keep_best(
    experts_BSK: Tensor, wanted_BSK: Tensor, priority_BSE: Tensor, rows: int, scope: Scope, surroundings: LocalScope
) -> Tensor:
    """(B, S, K): of the wanted choices those with the highest priority for their expert in the scope.

    Gathers a number for each token and expert of the scope, which in scope batch is that many of the whole micro-batch.
    """
    asked_BSK = priority_BSE.gather(-1, experts_BSK).masked_fill(~wanted_BSK, -torch.inf)
    asked_BSE = torch.full_like(priority_BSE, -torch.inf).scatter(-1, experts_BSK, asked_BSK)
    return best_of_scope(asked_BSE, rows, scope, surroundings).gather(-1, experts_BSK) & wanted_BSK


def best_of_scope(priority_BSE: Tensor, rows: int, scope: Scope, surroundings: LocalScope) -> Tensor:
    """Booleans (B, S, E): each expert's `rows` best tokens in the scope; ties go to the earlier, -inf is never taken.

    Values that differ by rounding alone are ties: equal tokens (all sequences that begin alike have some) must tie on any layout.
    """
    gathered_GTE = without_last_bits(surroundings.gather(priority_BSE, scope))
    order_GTE = gathered_GTE.argsort(dim=1, descending=True, stable=True)
    taken_GTE = torch.zeros_like(gathered_GTE, dtype=torch.bool).scatter_(1, order_GTE[:, :rows], True)
    sequences, length, _ = priority_BSE.shape
    return surroundings.own(taken_GTE & (gathered_GTE > -torch.inf), sequences, length, scope)


def without_last_bits(x: Tensor, kept: int = 16) -> Tensor:
    """`x` rounded to so many significant bits (the splitting of Veltkamp and Dekker, 1971)."""
    spread = x * (2.0 / torch.finfo(x.dtype).eps / 2**kept + 1)
    return torch.where(x.isfinite(), spread - (spread - x), x)


def count_choices(experts_BSK: Tensor, counted_BSK: Tensor | None, columns: int) -> Tensor:
    """int64 (B, E): how many choices of each expert a sequence has; (B, S, K) or (B, S, 1) booleans say which count, None: all."""
    chosen_BA = experts_BSK.flatten(1)
    counted = True if counted_BSK is None else counted_BSK
    ones_BA = torch.empty_like(chosen_BA)
    ones_BA.view(experts_BSK.shape)[:] = counted  # broadcasts and casts at once
    return chosen_BA.new_zeros(len(chosen_BA), columns).scatter_add_(1, chosen_BA, ones_BA)


def _places(experts_BSK: Tensor, wanted_BSK: Tensor, counts_BE: Tensor) -> Tensor:
    """(B, S, K): how many wanted choices of the same expert come earlier in the same sequence."""
    experts = counts_BE.shape[1]
    chosen_BA = experts_BSK.flatten(1).masked_fill(~wanted_BSK.flatten(1), experts)
    order_BA = chosen_BA.argsort(dim=1, stable=True)
    starts_BE = counts_BE.cumsum(1) - counts_BE
    starts_BE = torch.cat([starts_BE, counts_BE.sum(1, keepdim=True)], dim=1)
    place_in_order_BA = torch.arange(chosen_BA.shape[1], device=chosen_BA.device).expand_as(chosen_BA)
    places_BA = torch.empty_like(chosen_BA).scatter_(1, order_BA, place_in_order_BA)
    return (places_BA - starts_BE.gather(1, chosen_BA)).view_as(experts_BSK)
