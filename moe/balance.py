"""Load-balance losses as sums over this device's tokens, which add up over ranks to the global loss; and the expert bias.

L MoE layers, B sequences, E router columns (experts, then null experts), K choices per token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .capacity import LocalScope, count_choices, gather_groups, local_part_of_groups, piece_length
from .config import Scope


def balance_loss(counts: Tensor, scores: Tensor, tokens: Tensor, top_k: int) -> Tensor:
    """Switch Transformer's load-balance loss (Fedus et al. 2021, eq. 4-6), one value per leading index.

    Over first choices, with top_k = 1, it is E ** 2 times GShard's (Lepikhin et al. 2020, algorithm 1, line 13).

    The result E * sum_e f_e * P_e is linear in `scores`, so no gradient passes through a collective; it is 1 if the load is even.
    Over one sequence it is DeepSeek-V3's complementary sequence-wise loss (eq. 17-20). With groups of experts for experts it is
    DeepSeek-V2's device-level loss (eq. 26-28), and with `count_groups` and M groups per token its communication loss (eq. 29-31).

    Args:
        counts: (..., E), int64 choices of the WHOLE scope, the same on every rank.
        scores: (..., E), sums of router probabilities over this device's tokens.
        tokens: (...), valid tokens of the whole scope.
        top_k: choices of a token.
    """
    fraction = counts.to(scores.dtype) / (tokens * top_k).clamp(min=1).unsqueeze(-1)  # dividing two int64 would give fp32
    mean_score = scores / tokens.clamp(min=1).unsqueeze(-1)
    return counts.shape[-1] * (fraction * mean_score).sum(dim=-1)


def sum_groups(x: Tensor, groups: int) -> Tensor:
    """(..., E) to (..., G): sums over the experts of each group."""
    return x.unflatten(-1, (groups, -1)).sum(-1)


def count_groups(experts_BSK: Tensor, valid_BS: Tensor, columns: int, groups: int) -> Tensor:
    """int64 (B, G): the tokens of each sequence that go to each group of experts, once however many of them they chose."""
    index_BSK = experts_BSK // (columns // groups)
    sent_BSG = valid_BS.new_zeros(*valid_BS.shape, groups).scatter(-1, index_BSK, True)
    return (sent_BSG & valid_BS.unsqueeze(-1)).sum(1)


class GroupSums(NamedTuple):
    """GShard's balance loss over groups of tokens: P pieces of sequences, each within one group (moe/capacity.py)."""

    counts_PE: Tensor
    """int64: first choices of each column in the WHOLE group of each piece."""
    tokens_P: Tensor
    """int64: valid tokens of the whole group of each piece."""
    scores_PE: Tensor
    """Sum over the piece's valid tokens of the router's probabilities, differentiable."""


def group_sums(first_BS1: Tensor, valid_BS: Tensor, probabilities_BSE: Tensor, groups: int, scopes: LocalScope) -> GroupSums:
    """Counts what algorithm 1 of GShard (lines 3 and 13) needs, for each of the `groups` of the batch."""
    (sequences, length, columns), batch = probabilities_BSE.shape, Scope.batch
    piece = piece_length(sequences, length, batch, groups, scopes)
    pieces = length // piece
    first_PS1, valid_PS1 = (x.reshape(sequences * pieces, piece, 1) for x in (first_BS1, valid_BS))
    counts_PE = torch.cat([count_choices(first_PS1, valid_PS1, columns), valid_PS1.sum(1)], dim=1)
    counts_GTE = gather_groups(counts_PE.view(sequences, pieces, columns + 1), 0, batch, groups, scopes)
    totals_GTE = counts_GTE.sum(1, keepdim=True).expand_as(counts_GTE)
    totals_PE = local_part_of_groups(totals_GTE, sequences, pieces, batch, groups, scopes).reshape_as(counts_PE)
    scores_PE = (probabilities_BSE.reshape(sequences * pieces, piece, columns) * valid_PS1).sum(1)
    return GroupSums(totals_PE[:, :-1], totals_PE[:, -1], scores_PE)


class PooledSums(NamedTuple):
    """One layer's part of transformers' load-balance loss, which has one product of means for all MoE layers together.

    Its counts and probabilities are those of a softmax, whatever the experts are scored and chosen by.
    """

    counts_BE: Tensor
    """int64: tokens of each sequence that have the column among their top_k largest logits."""
    scores_BE: Tensor
    """Sum over each sequence's tokens of the softmax of the logits, differentiable."""


class Variation(NamedTuple):
    """A value that is not linear in this device's sums, and a linear term to differentiate instead."""

    value: Tensor
    """The same on every rank of the scope; without gradient."""
    slope: Tensor
    """Linear in this device's sums: its gradients add up over the ranks to those of `value`. Only its gradient is meaningful."""


def squared_variation(total: Tensor, mine: Tensor) -> Variation:
    """Squared coefficient of variation over E, variance / mean ** 2 (Shazeer et al. 2017, eq. 6-7), one value per leading index.

    d value / d total_e = 2 E / sum * (share_e - sum of squared shares), which does not depend on how the sums are split over ranks.

    Args:
        total: (..., E), sums over the WHOLE scope.
        mine: (..., E), this device's part of them, differentiable.
    """
    total = total.detach()
    everything = total.sum(dim=-1, keepdim=True)
    share = total / everything.clamp(min=torch.finfo(total.dtype).tiny)
    squares = share.square().sum(dim=-1, keepdim=True)
    experts, some = total.shape[-1], everything > 0
    value = torch.where(some, experts * squares - 1, 0.0).squeeze(-1)
    factor = torch.where(some, 2 * experts * (share - squares) / everything, 0.0)
    return Variation(value, (factor * mine).sum(dim=-1))


@torch.no_grad()
def update_expert_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """Auxiliary-loss-free balancing (Wang et al. 2024; DeepSeek-V3, section 2.1.2): b += rate * sign(mean - count), in place.

    counts_E: int64 choices of the whole optimizer step, over all ranks; integers, so that an even load changes nothing.
    """
    bias_E.add_(torch.sign(counts_E.sum() - counts_E * len(counts_E)).to(bias_E.dtype), alpha=rate)
