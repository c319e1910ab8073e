"""Which choices an expert of limited capacity keeps (GShard, Switch Transformer, V-MoE).

Dropping token by token is causal: whether a choice is kept depends on earlier tokens alone. Dropping by probability or priority is
not, nor is placing all first choices before any second one.
B sequences, S tokens of each, E experts, K choices per token, A = S * K choices of a sequence, T tokens of a scope or group, G
scopes or groups seen here, P pieces of sequences: runs of tokens of one sequence that lie in one group.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from .config import CapacityConfig, MoEConfig, Scope
from .device import constant_when_compiled

MANTISSA_BITS = 16
"""Priorities that agree in these bits are equal."""


class LocalScope:
    """Scopes on a device that holds the whole micro-batch; parallel/scopes.py extends them over ranks."""

    def tokens(self, sequences: int, length: int, scope: Scope) -> int:
        """Returns the number of tokens of a scope, valid or not, if this device has (B, S)."""
        return length if scope is Scope.sequence else sequences * length

    def total(self, x_BE: Tensor, scope: Scope) -> Tensor:
        """(G, E): the sum over each scope; G is B or 1."""
        return x_BE if scope is Scope.sequence else x_BE.sum(dim=0, keepdim=True)

    def gather(self, x_BSE: Tensor, scope: Scope) -> Tensor:
        """(G, T, E): all tokens of each scope, in the order they have on one device."""
        return x_BSE if scope is Scope.sequence else x_BSE.flatten(0, 1).unsqueeze(0)

    def local_part(self, x_GTE: Tensor, sequences: int, length: int, scope: Scope) -> Tensor:
        """(B, S, E): the inverse of `gather`; this device's `sequences` of `length` tokens."""
        return x_GTE if scope is Scope.sequence else x_GTE.reshape(sequences, length, x_GTE.shape[2])

    def run_length(self, length: int) -> int:
        """Returns how many tokens follow each other if this device has `length` tokens of a sequence: a divisor of it."""
        return length


# Groups (GShard, section 2.2): the tokens of a scope in their order, split into `groups` runs of equal size.


def group_size(tokens: int, groups: int) -> int:
    """Returns the tokens of a group; the last ones of a scope that does not divide are shorter."""
    return -(-tokens // groups)


def gather_groups(x_BSE: Tensor, fill: float, scope: Scope, groups: int, scopes: LocalScope) -> Tensor:
    """(G, T, E): all tokens of each group, in the order they have on one device; `fill` where the last groups are shorter."""
    x_GTE = scopes.gather(x_BSE, scope)
    if groups == 1:
        return x_GTE
    scopes_seen, tokens, columns = x_GTE.shape
    size = group_size(tokens, groups)
    filled = torch.nn.functional.pad(x_GTE, (0, 0, 0, groups * size - tokens), value=fill)
    return filled.reshape(scopes_seen * groups, size, columns)


def local_part_of_groups(x_GTE: Tensor, sequences: int, length: int, scope: Scope, groups: int, scopes: LocalScope) -> Tensor:
    """(B, S, E): the inverse of `gather_groups`; this device's `sequences` of `length` tokens."""
    if groups > 1:
        x_GTE = x_GTE.unflatten(0, (-1, groups)).flatten(1, 2)[:, : scopes.tokens(sequences, length, scope)]
    return scopes.local_part(x_GTE, sequences, length, scope)


def piece_length(sequences: int, length: int, scope: Scope, groups: int, scopes: LocalScope) -> int:
    """Returns how long pieces are: the most that divides a sequence's tokens on this device, and a group unless there is one."""
    size, length = group_size(scopes.tokens(sequences, length, scope), groups), scopes.run_length(length)
    return max(1, length if groups == 1 else math.gcd(length, size))


def capacity(factor: float, tokens: int, config: MoEConfig) -> int:
    """Returns an expert's rows of a scope or group: ceil(factor * tokens * K / E), at least capacity.minimum (GShard, section 2.2).

    In exact decimals, since 1.1 * 100 is above 110 in floating point, and a tenth of it would round up to 12.
    """
    columns, (numerator, denominator) = config.experts + config.router.null_experts, _decimal_ratio(factor)
    return max(config.capacity.minimum, -(-numerator * tokens * config.top_k // (denominator * columns)))


@constant_when_compiled
def _decimal_ratio(x: float) -> tuple[int, int]:
    return Fraction(str(x)).as_integer_ratio()


def max_rows(rows: int, sequences: int, length: int, limits: CapacityConfig) -> int:
    """Returns the most rows that an expert of capacity `rows` can take of (B, S) tokens; padding fills up to it."""
    if limits.scope is Scope.sequence:
        return sequences * min(rows, length)
    return min(rows * limits.groups, sequences * length)


def keep_earliest(
    experts_BSK: Tensor,
    wanted_BSK: Tensor,
    rows: int,
    columns: int,
    scope: Scope,
    scopes: LocalScope,
    groups: int = 1,
    firsts_first: bool = False,
) -> Tensor:
    """(B, S, K): keeps the wanted choices that are among the first `rows` of their expert in the scope, or in their group of it.

    Choices have the order of the tokens; with `firsts_first` all first choices come before any second one (GShard, algorithm 1).
    Gathers the counts of each piece, not the choices.
    """
    sequences, length, top_k = experts_BSK.shape
    piece = piece_length(sequences, length, scope, groups, scopes)
    pieces = length // piece
    if firsts_first:  # each rank of choices has columns of its own
        experts_BSK = experts_BSK + columns * torch.arange(top_k, device=experts_BSK.device)
    columns_in_all = columns * top_k if firsts_first else columns
    experts_PSK, wanted_PSK = (x.reshape(sequences * pieces, piece, top_k) for x in (experts_BSK, wanted_BSK))
    counts_PC = count_choices(experts_PSK, wanted_PSK, columns_in_all)
    counts_GTC = gather_groups(counts_PC.view(sequences, pieces, columns_in_all), 0, scope, groups, scopes)
    before_GTC = counts_GTC.cumsum(1) - counts_GTC
    if firsts_first:
        total_GKE = counts_GTC.sum(1).unflatten(1, (top_k, columns))
        before_GTC = before_GTC + (total_GKE.cumsum(1) - total_GKE).flatten(1).unsqueeze(1)
    before_PC = local_part_of_groups(before_GTC, sequences, pieces, scope, groups, scopes).reshape_as(counts_PC)
    positions_PSK = _positions(experts_PSK, wanted_PSK, counts_PC) + before_PC.gather(1, experts_PSK.flatten(1)).view_as(
        experts_PSK
    )
    return wanted_BSK & (positions_PSK < rows).view_as(wanted_BSK)


def keep_by_priority(
    experts_BSK: Tensor,
    wanted_BSK: Tensor,
    priority_BS: Tensor,
    rows: int,
    columns: int,
    scope: Scope,
    scopes: LocalScope,
    groups: int = 1,
) -> Tensor:
    """(B, S, K): places the first choices of all tokens of the scope or group, then the second ones, each by the tokens' priority.

    Batch-prioritized routing (V-MoE, Riquelme et al. 2021, algorithm 2): the first `rows` of each expert are kept; of equal
    priorities the earlier token is first. Gathers the choices and priorities of the scope.
    """
    sequences, length, top_k = experts_BSK.shape
    priority_GT1 = gather_groups(priority_BS.unsqueeze(-1), -torch.inf, scope, groups, scopes)
    experts_GTK = gather_groups(experts_BSK.masked_fill(~wanted_BSK, columns), columns, scope, groups, scopes)
    order_GTK = round_mantissa(priority_GT1).argsort(dim=1, descending=True, stable=True).expand_as(experts_GTK)
    placed_GA1 = experts_GTK.gather(1, order_GTK).transpose(1, 2).flatten(1).unsqueeze(-1)
    wanted_GA1, known_GA1 = placed_GA1 < columns, placed_GA1.clamp(max=columns - 1)
    positions_GA1 = _positions(known_GA1, wanted_GA1, count_choices(known_GA1, wanted_GA1, columns))
    sorted_GTK = (wanted_GA1 & (positions_GA1 < rows)).view(len(experts_GTK), top_k, experts_GTK.shape[1]).transpose(1, 2)
    kept_GTK = torch.zeros_like(experts_GTK, dtype=torch.bool).scatter(1, order_GTK, sorted_GTK)
    return local_part_of_groups(kept_GTK, sequences, length, scope, groups, scopes)


def keep_best(
    experts_BSK: Tensor, wanted_BSK: Tensor, priority_BSE: Tensor, rows: int, scope: Scope, scopes: LocalScope, groups: int = 1
) -> Tensor:
    """(B, S, K): keeps the `rows` wanted choices with the highest priority for their expert in the scope or group.

    Gathers one number for each token and expert of the scope; in scope batch, of the whole micro-batch.
    """
    wanted_priority_BSK = priority_BSE.gather(-1, experts_BSK).masked_fill(~wanted_BSK, -torch.inf)
    wanted_priority_BSE = torch.full_like(priority_BSE, -torch.inf).scatter(-1, experts_BSK, wanted_priority_BSK)
    return best_of_scope(wanted_priority_BSE, rows, scope, scopes, groups).gather(-1, experts_BSK) & wanted_BSK


def best_of_scope(priority_BSE: Tensor, rows: int, scope: Scope, scopes: LocalScope, groups: int = 1) -> Tensor:
    """Booleans (B, S, E): the `rows` best tokens of each expert in the scope or group; of equal ones the earlier, and never -inf.

    Values that differ only by rounding are equal: equal tokens, as where sequences begin alike, must tie on any layout.
    """
    gathered_GTE = round_mantissa(gather_groups(priority_BSE, -torch.inf, scope, groups, scopes))
    order_GTE = gathered_GTE.argsort(dim=1, descending=True, stable=True)
    taken_GTE = torch.zeros_like(gathered_GTE, dtype=torch.bool).scatter_(1, order_GTE[:, :rows], True)
    sequences, length, _ = priority_BSE.shape
    return local_part_of_groups(taken_GTE & (gathered_GTE > -torch.inf), sequences, length, scope, groups, scopes)


def round_mantissa(x: Tensor) -> Tensor:
    """Rounds `x` to MANTISSA_BITS significant bits (the splitting of Veltkamp and Dekker, 1971)."""
    spread = x * (2.0 / torch.finfo(x.dtype).eps / 2**MANTISSA_BITS + 1)
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
