"""The loss of a micro-batch: cross entropy, balance losses and router z-loss, each this rank's share of the global one.

Shares ADD UP over ranks and micro-batches to the loss of the global batch, so gradients are summed and no factor depends on the
layout. L MoE layers, B sequences of this rank, S tokens of each (a slice under tensor parallelism), E router columns.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..moe.balance import Variation, balance_loss, squared_variation, sum_groups
from ..moe.config import ModelConfig, MoEConfig, Scope
from ..moe.router import RoutingStats
from ..parallel.mesh import Mesh
from ..parallel.scopes import scope_axis, scope_sum
from ..parallel.streams import on_device


class Totals(NamedTuple):
    """The totals that shares are divided by, the same on every rank. On a GPU the counts are scalars of the device."""

    tokens: int | Tensor
    """Valid tokens of the global batch."""
    sequences: int | Tensor
    """Sequences of the global batch."""
    micro_batches: int
    """Micro-batches of the global batch."""
    mtp_tokens: tuple[int | Tensor, ...] = ()
    """Tokens of the global batch that each module of multi-token prediction predicts."""


LAYER_FIELDS = ("balance_L", "sequence_L", "device_L", "communication_L", "importance_L", "z_L", "dropped_L")
"""The fields of `Losses` with a number for each layer, which add up over micro-batches and ranks; overflow_L does too."""


class Losses(NamedTuple):
    """This rank's shares of the losses, and its counts. Coefficients apply in `objective` only."""

    objective: Tensor
    """The scalar to differentiate."""
    cross_entropy: Tensor
    """Scalar, nats: sum over tokens / the global batch's tokens (and / the tensor ranks, which all have the same sum)."""
    balance_L: Tensor
    """With balance.pool_layers what each layer contributes to the one loss."""
    sequence_L: Tensor
    """DeepSeek-V3's sequence-wise balance loss; zeros if it is off."""
    device_L: Tensor
    """DeepSeek-V2's device-level balance loss; zeros if it is off."""
    communication_L: Tensor
    """DeepSeek-V2's communication balance loss; zeros if it is off."""
    importance_L: Tensor
    """Sum of the squared variations of importance and load; zeros if it is off."""
    z_L: Tensor
    counts_LE: Tensor
    """Choices of each router column, null experts included."""
    dropped_L: Tensor
    mtp_D: Tensor = torch.empty(0)
    """Cross entropy of each module of multi-token prediction, by its own tokens; see `add_mtp`."""
    router_metrics_LG: Tensor = torch.empty(0, 0)
    """Sums of router metrics (moe/router.py), fp64; without columns if the routers do not collect them."""
    logit_max_L: Tensor = torch.empty(0)
    """Largest absolute router logit of this rank and micro-batch: a maximum, which does not add up."""
    overflow_L: Tensor = torch.empty(0, dtype=torch.int64)
    """Choices that the exchange had no room for."""


def losses(summed: Tensor, stats: list[RoutingStats], config: MoEConfig, totals: Totals, mesh: Mesh) -> Losses:
    """Returns cross entropy / tokens + sum over layers of the balance losses and the z-loss, each times its coefficient.

    `summed`: the sum of the cross entropy over this rank's tokens, the same on all tensor ranks. See `add_pooled_balance` for the
    loss that is one of all layers.
    """
    cross_entropy = summed / totals.tokens
    if not stats:
        none = cross_entropy.new_zeros(0)
        empty = torch.zeros(0, dtype=torch.int64, device=none.device)
        return Losses(
            cross_entropy,
            cross_entropy.detach() / mesh.tensor.size,
            *(none, none, none, none, none, none),
            empty.view(0, 0),
            empty,
            overflow_L=empty,
        )
    balance = config.balance
    z_L = torch.stack([layer.z for layer in stats]) / totals.tokens
    if balance.pool_layers:
        balance_L = torch.zeros_like(z_L)
    elif stats[0].group_sums:
        balance_L = _by_group(stats, config, totals)
    else:
        balance_L = _balance(stats, _choices, balance.scope, config, totals, mesh)
    sequence_L = device_L = communication_L = torch.zeros_like(z_L)
    if balance.sequence_coefficient:
        sequence_L = _balance(stats, _choices_of_sequence, Scope.sequence, config, totals, mesh)
    if balance.device_coefficient:
        device_L = _balance(stats, _choices_of_device, balance.scope, config, totals, mesh)
    if balance.communication_coefficient:
        communication_L = _balance(stats, _sent_to_device, balance.scope, config, totals, mesh)
    importance = (
        _importance(stats, balance.scope, totals, mesh)
        if balance.importance_coefficient
        else Variation(*2 * [torch.zeros_like(z_L)])
    )
    auxiliary = (
        balance.coefficient * balance_L.sum()
        + balance.sequence_coefficient * sequence_L.sum()
        + balance.device_coefficient * device_L.sum()
        + balance.communication_coefficient * communication_L.sum()
        + balance.importance_coefficient * importance.slope.sum()
        + config.z_coefficient * z_L.sum()
    )
    return Losses(
        objective=cross_entropy + auxiliary.to(cross_entropy.dtype),
        cross_entropy=cross_entropy.detach() / mesh.tensor.size,
        balance_L=balance_L.detach(),
        sequence_L=sequence_L.detach(),
        device_L=device_L.detach(),
        communication_L=communication_L.detach(),
        importance_L=importance.value,
        z_L=z_L.detach(),
        counts_LE=torch.stack([layer.counts_BE for layer in stats]).sum(1),
        dropped_L=torch.stack([layer.dropped for layer in stats]),
        **_router_metrics(stats),
        overflow_L=torch.stack([layer.dropped.new_zeros(()) if layer.overflow is None else layer.overflow for layer in stats]),
    )


def _router_metrics(stats: list[RoutingStats]) -> dict[str, Tensor]:
    """Returns the fields of Losses about router metrics."""
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


def pooled_sums(stats: list[RoutingStats], config: MoEConfig) -> Tensor | None:
    """Returns what balance.pool_layers pools of each layer, (L, B, 2 E + 1); None if it is off or there is no layer.

    These are choices, valid tokens, and sums of probabilities, which alone are differentiable, in whose type (fp32 or wider)
    the counts of a micro-batch on one rank are exact. So one tensor passes from stage to stage of a pipeline.
    """
    if not config.balance.pool_layers or not stats:
        return None
    pooled = [(layer.pooled, layer.tokens_B.unsqueeze(1)) for layer in stats if layer.pooled is not None]
    return torch.stack([torch.cat([each.counts_BE, tokens_B1, each.scores_BE], dim=1) for each, tokens_B1 in pooled])


def add_pooled_balance(share: Losses, pooled_LBC: Tensor | None, config: MoEConfig, totals: Totals, mesh: Mesh) -> Losses:
    """Adds the load-balance loss of the means over all layers, times its coefficient. `pooled_LBC`: `pooled_sums` of all layers.

    It is linear in the probabilities of each layer; balance_L is what each layer adds to it.
    """
    if pooled_LBC is None:
        return share
    counted_LBC, scores_LBE = pooled_LBC.tensor_split([pooled_LBC.shape[-1] // 2 + 1], dim=-1)
    balance_L = _mean_over_scopes(
        counted_LBC.long().sum(0, keepdim=True), scores_LBE, config.top_k, config.balance.scope, totals, mesh
    )
    objective = share.objective + (config.balance.coefficient * balance_L.sum()).to(share.objective.dtype)
    return share._replace(objective=objective, balance_L=balance_L.detach())


def add_mtp(share: Losses, summed: list[Tensor], config: ModelConfig, totals: Totals, mesh: Mesh) -> Losses:
    """Adds the mean cross entropy of the modules times its coefficient (DeepSeek-V3, eq. 24-25). `summed`: as in `losses`."""
    if not summed:
        return share._replace(mtp_D=share.objective.new_zeros(0))
    mtp_D = torch.stack([total / tokens for total, tokens in zip(summed, totals.mtp_tokens, strict=True)])
    objective = share.objective + config.mtp_coefficient * mtp_D.mean()
    return share._replace(objective=objective, mtp_D=mtp_D.detach() / mesh.tensor.size)


def without_graph(share: Losses) -> Losses:
    """Returns the numbers of a micro-batch without what they were made of, which exchanges would keep until the step ends."""
    return Losses(*(x.detach() for x in share))


def among_all_layers(share: Losses, rows: list[int], layers: int, columns: int, mtp_depth: int, metrics: int) -> Losses:
    """Returns the share of a pipeline stage with the numbers of its MoE layers at their places `rows` among all `layers`; zeros
    elsewhere. Shares of all stages then add up as those of micro-batches do.

    `columns` of the routers, `mtp_depth` modules of multi-token prediction and `metrics` are those of every stage.
    """
    at_L = on_device(torch.tensor(rows, dtype=torch.int64), share.objective.device)

    def spread(x: Tensor, *sizes: int) -> Tensor:
        found = share.objective.new_zeros(layers, *sizes, dtype=x.dtype)
        return found.index_copy_(0, at_L, x) if rows else found

    none = share.cross_entropy
    return Losses(
        share.objective,
        share.cross_entropy,
        *(spread(getattr(share, name)) for name in LAYER_FIELDS[:-1]),
        counts_LE=spread(share.counts_LE, columns),
        dropped_L=spread(share.dropped_L),
        mtp_D=share.mtp_D if len(share.mtp_D) else none.new_zeros(mtp_depth),
        router_metrics_LG=spread(share.router_metrics_LG.double(), metrics),
        logit_max_L=spread(share.logit_max_L) if metrics and rows else none.new_zeros(layers if metrics else 0),
        overflow_L=spread(share.overflow_L),
    )


def add_shares(shares: list[Losses]) -> Losses:
    """Adds the shares of a rank's stages."""
    logit_max_L = torch.stack([share.logit_max_L for share in shares]).amax(0)
    return Losses._make(sum(parts[1:], parts[0]) for parts in zip(*shares, strict=True))._replace(logit_max_L=logit_max_L)


class Counted(NamedTuple):
    """What a balance loss is made of in one layer. C columns: experts, or groups of experts."""

    counts_BC: Tensor
    scores_BC: Tensor
    per_token: int
    """Counts of a token."""


def _choices(layer: RoutingStats, config: MoEConfig) -> Counted:
    """Counts all choices of a token; GShard counts first ones."""
    if layer.first_BE is not None:
        return Counted(layer.first_BE, layer.scores_BE, 1)
    return Counted(layer.counts_BE, layer.scores_BE, config.top_k)


def _choices_of_sequence(layer: RoutingStats, config: MoEConfig) -> Counted:
    return Counted(layer.counts_BE if layer.best_BE is None else layer.best_BE, layer.scores_BE, config.top_k)


def _choices_of_device(layer: RoutingStats, config: MoEConfig) -> Counted:
    """DeepSeek-V2, eq. 26-28; the devices D are router.groups."""
    groups = config.router.groups
    return Counted(sum_groups(layer.counts_BE, groups), sum_groups(layer.scores_BE, groups), config.top_k)


def _sent_to_device(layer: RoutingStats, config: MoEConfig) -> Counted:
    """DeepSeek-V2, eq. 29-31; a token goes to at most M = router.top_groups devices."""
    assert layer.sent_BG is not None
    return Counted(layer.sent_BG, sum_groups(layer.scores_BE, config.router.groups), config.router.top_groups)


def _balance(
    stats: list[RoutingStats],
    of_layer: Callable[[RoutingStats, MoEConfig], Counted],
    scope: Scope,
    config: MoEConfig,
    totals: Totals,
    mesh: Mesh,
) -> Tensor:
    """Returns this rank's share (L,) of a balance loss: a mean over sequences, micro-batches, or micro-batches of ranks."""
    counted = [of_layer(layer, config) for layer in stats]
    scores_LBC, per_token = torch.stack([layer.scores_BC for layer in counted]), counted[0].per_token
    with_tokens = [torch.cat([of.counts_BC, layer.tokens_B.unsqueeze(1)], dim=1) for of, layer in zip(counted, stats, strict=True)]
    return _mean_over_scopes(torch.stack(with_tokens), scores_LBC, per_token, scope, totals, mesh)


def _mean_over_scopes(counted_LBC: Tensor, scores_LBC: Tensor, per_token: int, scope: Scope, totals: Totals, mesh: Mesh) -> Tensor:
    """Returns `_balance` of the scores; `counted_LBC`: counts of the columns and then the valid tokens, of each layer or of all."""
    chosen = scope_sum(counted_LBC, scope, mesh)
    counts, tokens = chosen[..., :-1], chosen[..., -1]
    if scope is Scope.sequence:
        return balance_loss(counts, scores_LBC, tokens, per_token).sum(1) / _scopes(scope, totals, mesh)
    return balance_loss(counts, scores_LBC.sum(1), tokens, per_token) / _scopes(scope, totals, mesh)


def _by_group(stats: list[RoutingStats], config: MoEConfig, totals: Totals) -> Tensor:
    """Returns this rank's share (L,) of GShard's balance loss: a mean over the groups of all micro-batches."""
    sums = [layer.group_sums for layer in stats if layer.group_sums is not None]
    counts_LPE, tokens_LP, scores_LPE = (torch.stack(parts) for parts in zip(*sums, strict=True))
    return balance_loss(counts_LPE, scores_LPE, tokens_LP, 1).sum(1) / (totals.micro_batches * config.capacity.groups)


def _importance(stats: list[RoutingStats], scope: Scope, totals: Totals, mesh: Mesh) -> Variation:
    """Returns this rank's share (L,) of the squared variations. All ranks of a scope have the same value; each reports a part."""
    mine = torch.stack([part for layer in stats for part in (layer.importance_BE, layer.load_BE) if part is not None])
    value, slope = squared_variation(scope_sum(mine, scope, mesh), mine if scope is Scope.sequence else mine.sum(1))
    value = value / scope_axis(scope, mesh).size
    if scope is Scope.sequence:
        value, slope = value.sum(1), slope.sum(1)
    parts = _scopes(scope, totals, mesh)
    return Variation(value.view(-1, 2).sum(1) / parts, slope.view(-1, 2).sum(1) / parts)


def _scopes(scope: Scope, totals: Totals, mesh: Mesh) -> int | Tensor:
    """Returns the number of scopes in the global batch."""
    if scope is Scope.sequence:
        return totals.sequences
    return totals.micro_batches * (mesh.stage.size if scope is Scope.rank else 1)
