"""The loss of a micro-batch: cross entropy, load-balance loss and router z-loss, each this rank's share of the global one.

Shares ADD UP over ranks and micro-batches to the loss of the global batch, so gradients are summed and no factor depends on the
layout. L MoE layers, B sequences of this rank, S tokens of each (a slice of them under tensor parallelism), E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batches import IGNORE
from ..moe.balance import balance_loss
from ..moe.config import ModelConfig, MoEConfig, Scope
from ..moe.mtp import ahead
from ..moe.router import RoutingStats
from ..parallel.mesh import Mesh
from ..parallel.scopes import scope_counts
from ..parallel.vocabulary import cross_entropy_sum


class Totals(NamedTuple):
    """What the shares are shares of, the same on every rank."""

    tokens: int
    """Valid tokens of the global batch."""
    sequences: int
    """Sequences of the global batch."""
    micro_batches: int
    """Micro-batches of the global batch."""
    mtp_tokens: tuple[int, ...] = ()
    """Tokens of the global batch that each module of multi-token prediction predicts."""


class Losses(NamedTuple):
    """This rank's shares, and counts. Reported values are unscaled: coefficients apply in `objective` only."""

    objective: Tensor
    """Scalar to differentiate."""
    cross_entropy: Tensor
    """Scalar, nats: sum over tokens / the global batch's tokens (and / the tensor ranks, which all have the same sum)."""
    balance_L: Tensor
    z_L: Tensor
    counts_LE: Tensor
    dropped_L: Tensor
    mtp_D: Tensor = torch.empty(0)
    """Cross entropy of each module of multi-token prediction, by its own tokens; see `add_mtp`."""


def losses(
    logits_BSV: Tensor, targets_BS: Tensor, stats: list[RoutingStats], config: MoEConfig, totals: Totals, mesh: Mesh
) -> Losses:
    """Cross entropy / tokens + sum over layers of (coefficient x balance loss + coefficient x z-loss)."""
    summed = cross_entropy_sum(logits_BSV.flatten(0, 1), targets_BS.flatten(), IGNORE, mesh.tensor)
    cross_entropy = summed / totals.tokens
    if not stats:
        none = cross_entropy.new_zeros(0)
        empty = torch.zeros(0, dtype=torch.int64, device=none.device)
        return Losses(cross_entropy, cross_entropy.detach() / mesh.tensor.size, none, none, empty.view(0, 0), empty)
    counts_LBE = torch.stack([layer.counts_BE for layer in stats])
    scores_LBE = torch.stack([layer.scores_BE for layer in stats])
    balance_L = _balance(counts_LBE, scores_LBE, config, totals, mesh)
    z_L = torch.stack([layer.z for layer in stats]) / totals.tokens
    auxiliary = config.balance.coefficient * balance_L.sum() + config.z_coefficient * z_L.sum()
    return Losses(
        objective=cross_entropy + auxiliary.to(cross_entropy.dtype),
        cross_entropy=cross_entropy.detach() / mesh.tensor.size,
        balance_L=balance_L.detach(),
        z_L=z_L.detach(),
        counts_LE=counts_LBE.sum(1),
        dropped_L=torch.stack([layer.dropped for layer in stats]),
    )


def add_mtp(share: Losses, logits: list[Tensor], targets_BS: Tensor, config: ModelConfig, totals: Totals, mesh: Mesh) -> Losses:
    """With coefficient x the mean of the modules' cross entropies (DeepSeek-V3, eq. 24-25).

    Module d predicts at position i the target of i + d; there is none where that is beyond the sequence.
    """
    if not logits:
        return share._replace(mtp_D=share.objective.new_zeros(0))
    parts = []
    for depth, logits_BSV in enumerate(logits, 1):
        targets_T = ahead(targets_BS, depth, IGNORE).flatten()
        summed = cross_entropy_sum(logits_BSV.flatten(0, 1), targets_T, IGNORE, mesh.tensor)
        parts.append(summed / totals.mtp_tokens[depth - 1])
    mtp_D = torch.stack(parts)
    objective = share.objective + config.mtp_coefficient * mtp_D.mean()
    return share._replace(objective=objective, mtp_D=mtp_D.detach() / mesh.tensor.size)


def _balance(counts_LBE: Tensor, scores_LBE: Tensor, config: MoEConfig, totals: Totals, mesh: Mesh) -> Tensor:
    """This rank's share (L,) of the balance loss: a mean over sequences, over micro-batches, or over ranks' micro-batches."""
    scope, top_k = config.balance.scope, config.top_k
    counts = scope_counts(counts_LBE, scope, mesh)
    tokens = counts.sum(-1) // top_k
    if scope is Scope.sequence:
        return balance_loss(counts, scores_LBE, tokens, top_k).sum(1) / totals.sequences
    parts = totals.micro_batches * (mesh.world if scope is Scope.rank else 1)
    return balance_loss(counts, scores_LBE.sum(1), tokens, top_k) / parts
