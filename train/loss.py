"""The loss of a micro-batch: cross entropy, balance losses and router z-loss, each this rank's share of the global one.

Shares ADD UP over ranks and micro-batches to the loss of the global batch, so gradients are summed and no factor depends on the
layout. L MoE layers, B sequences of this rank, S tokens of each (a slice under tensor parallelism), E router columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..moe.balance import Variation, balance_loss, squared_variation
from ..moe.config import ModelConfig, MoEConfig, Scope
from ..moe.router import RoutingStats
from ..parallel.mesh import Mesh
from ..parallel.scopes import scope_axis, scope_sum


class Totals(NamedTuple):
    """What the shares are shares of, the same on every rank. On a GPU the counts stay there, as scalars: nobody waits for them."""

    tokens: int | Tensor
    """Valid tokens of the global batch."""
    sequences: int | Tensor
    """Sequences of the global batch."""
    micro_batches: int
    """Micro-batches of the global batch."""
    mtp_tokens: tuple[int | Tensor, ...] = ()
    """Tokens of the global batch that each module of multi-token prediction predicts."""


class Losses(NamedTuple):
    """This rank's shares, and counts. Reported values are unscaled: coefficients apply in `objective` only."""

    objective: Tensor
    """Scalar to differentiate."""
    cross_entropy: Tensor
    """Scalar, nats: sum over tokens / the global batch's tokens (and / the tensor ranks, which all have the same sum)."""
    balance_L: Tensor
    sequence_L: Tensor
    """DeepSeek-V3's sequence-wise balance loss; zeros if it is off."""
    importance_L: Tensor
    """Squared variation of importance and of load, added; zeros if it is off."""
    z_L: Tensor
    counts_LE: Tensor
    """Null experts included."""
    dropped_L: Tensor
    mtp_D: Tensor = torch.empty(0)
    """Cross entropy of each module of multi-token prediction, by its own tokens; see `add_mtp`."""
    router_metrics_LG: Tensor = torch.empty(0, 0)
    """Sums to watch (moe/router.py), fp64; without columns where nobody watches."""
    logit_max_L: Tensor = torch.empty(0)
    """Largest absolute router logit; of the same rank and micro-batch as the rest, and a maximum, so it does not add up."""


def losses(summed: Tensor, stats: list[RoutingStats], config: MoEConfig, totals: Totals, mesh: Mesh) -> Losses:
    """Cross entropy / tokens + sum over layers of the balance losses and the z-loss, each times its coefficient.

    `summed`: the cross entropy of this rank's tokens, added up; all tensor ranks have the same.
    """
    cross_entropy = summed / totals.tokens
    if not stats:
        none = cross_entropy.new_zeros(0)
        empty = torch.zeros(0, dtype=torch.int64, device=none.device)
        return Losses(cross_entropy, cross_entropy.detach() / mesh.tensor.size, none, none, none, none, empty.view(0, 0), empty)
    on = config.balance
    z_L = torch.stack([layer.z for layer in stats]) / totals.tokens
    balance_L = _balance(stats, on.scope, config.top_k, totals, mesh)
    sequence_L = _balance(stats, Scope.sequence, config.top_k, totals, mesh) if on.sequence_coefficient else torch.zeros_like(z_L)
    importance = (
        _importance(stats, on.scope, totals, mesh) if on.importance_coefficient else Variation(*2 * [torch.zeros_like(z_L)])
    )
    auxiliary = (
        on.coefficient * balance_L.sum()
        + on.sequence_coefficient * sequence_L.sum()
        + on.importance_coefficient * importance.slope.sum()
        + config.z_coefficient * z_L.sum()
    )
    return Losses(
        objective=cross_entropy + auxiliary.to(cross_entropy.dtype),
        cross_entropy=cross_entropy.detach() / mesh.tensor.size,
        balance_L=balance_L.detach(),
        sequence_L=sequence_L.detach(),
        importance_L=importance.value,
        z_L=z_L.detach(),
        counts_LE=torch.stack([layer.counts_BE for layer in stats]).sum(1),
        dropped_L=torch.stack([layer.dropped for layer in stats]),
        **_router_metrics(stats),
    )


def _router_metrics(stats: list[RoutingStats]) -> dict[str, Tensor]:
    router_metrics = [layer.router_metrics for layer in stats if layer.router_metrics is not None]
    if not router_metrics:
        return {
            "router_metrics_LG": stats[0].z.new_zeros((len(stats), 0), dtype=torch.float64),
            "logit_max_L": stats[0].z.new_zeros(0),
        }
    return {
        "router_metrics_LG": torch.stack([g.sums() for g in router_metrics]),
        "logit_max_L": torch.stack([g.logit_max for g in router_metrics]),
    }


def add_mtp(share: Losses, summed: list[Tensor], config: ModelConfig, totals: Totals, mesh: Mesh) -> Losses:
    """With coefficient x the mean of the cross entropies (`summed`, as in `losses`) of the modules (DeepSeek-V3, eq. 24-25)."""
    if not summed:
        return share._replace(mtp_D=share.objective.new_zeros(0))
    mtp_D = torch.stack([total / tokens for total, tokens in zip(summed, totals.mtp_tokens, strict=True)])
    objective = share.objective + config.mtp_coefficient * mtp_D.mean()
    return share._replace(objective=objective, mtp_D=mtp_D.detach() / mesh.tensor.size)


def _balance(stats: list[RoutingStats], scope: Scope, top_k: int, totals: Totals, mesh: Mesh) -> Tensor:
    """This rank's share (L,) of the balance loss: a mean over sequences, over micro-batches, or over ranks' micro-batches."""
    scores_LBE = torch.stack([layer.scores_BE for layer in stats])
    chosen_LBE = torch.stack([torch.cat([layer.counts_BE, layer.tokens_B.unsqueeze(1)], dim=1) for layer in stats])
    chosen = scope_sum(chosen_LBE, scope, mesh)
    counts, tokens = chosen[..., :-1], chosen[..., -1]
    if scope is Scope.sequence:
        return balance_loss(counts, scores_LBE, tokens, top_k).sum(1) / _scopes(scope, totals, mesh)
    return balance_loss(counts, scores_LBE.sum(1), tokens, top_k) / _scopes(scope, totals, mesh)


def _importance(stats: list[RoutingStats], scope: Scope, totals: Totals, mesh: Mesh) -> Variation:
    """This rank's share of the squared variations, (L,); of the value, all ranks of a scope have the same and report a part."""
    mine = torch.stack([part for layer in stats for part in (layer.importance_BE, layer.load_BE) if part is not None])
    value, slope = squared_variation(scope_sum(mine, scope, mesh), mine if scope is Scope.sequence else mine.sum(1))
    value = value / scope_axis(scope, mesh).size
    if scope is Scope.sequence:
        value, slope = value.sum(1), slope.sum(1)
    parts = _scopes(scope, totals, mesh)
    return Variation(value.view(-1, 2).sum(1) / parts, slope.view(-1, 2).sum(1) / parts)


def _scopes(scope: Scope, totals: Totals, mesh: Mesh) -> int | Tensor:
    """Scopes in the global batch."""
    if scope is Scope.sequence:
        return totals.sequences
    return totals.micro_batches * (mesh.world if scope is Scope.rank else 1)
