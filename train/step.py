"""One optimizer step: micro-batches, backward, reduction, norm, clip, update, expert bias."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batches import IGNORE
from ..moe.balance import update_expert_bias
from ..moe.device import kind_of
from ..moe.init import expert_biases
from ..moe.model import HeadLoss
from ..moe.router import SUMS
from ..moe.token_info import BatchPosition
from ..parallel.apply import Parallel
from ..parallel.collectives import sum_over
from ..parallel.fsdp import prepare_backward
from ..parallel.gradients import gradient_all_reduce, scale_gradients, squared_norm
from ..parallel.progress import in_phase
from ..parallel.streams import on_device
from ..parallel.vocabulary import head_loss
from .batch import Rows, targets_ahead, valid_targets
from .loss import Losses, Totals, add_mtp, losses
from .optimizer import set_learning_rate
from .step_flags import NOTHING, GlobalFlags, RankFlags, is_sound, numbers_of, read


class StepNumbers(NamedTuple):
    """What a step did, over the global batch, the same on every rank and every layout. Fp64 and int64 tensors."""

    tokens: int
    cross_entropy: Tensor
    balance_L: Tensor
    sequence_L: Tensor
    importance_L: Tensor
    z_L: Tensor
    counts_LE: Tensor
    """Null experts, the last columns, included."""
    dropped_L: Tensor
    mtp_D: Tensor
    """Cross entropy of each module of multi-token prediction."""
    gradient_norm: Tensor
    global_flags: GlobalFlags
    """On the host: loss, norm, and what the ranks told each other."""
    updated: bool = True
    """False: weights and moments are bit for bit what they were before the step."""
    router_metrics_LG: Tensor = torch.empty(0, 0)
    """Sums to watch (moe/router.py); without columns where nobody watches."""
    own_LP: Tensor = torch.empty(0, 0)
    """Of THIS RANK alone, fp64: largest absolute router logit, and rows that its experts computed."""


def train_step(
    parallel: Parallel,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Rows],
    lr: float,
    clip_norm: float | None,
    place: BatchPosition | None = None,
    rank_flags: RankFlags = NOTHING,
    accepts: Callable[[GlobalFlags], bool] = is_sound,
    meanwhile: Callable[[], None] = lambda: None,
) -> StepNumbers:
    """Train on one global batch, of which `micro_batches` are this rank's rows.

    `place` (None: the first step) says which step of which run it is, for capacity schedules and what is random in routing.
    `rank_flags` is what this rank has to tell the others. `accepts` decides, on every rank by the same numbers, whether to update.
    `meanwhile` is what the host does before it waits for the device, which has the whole step to do.
    """
    optimizer.zero_grad(set_to_none=True)
    totals = count_totals(parallel, micro_batches)
    shares = []
    for index, rows in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        prepare_backward(parallel.model, parallel.zero, last)
        share = forward(parallel, rows, totals, place)
        with gradient_all_reduce(parallel) if last else nullcontext():
            backward(share)
        shares.append(share)
    squared = squared_norm(parallel)
    meanwhile()
    numbers = add_up(parallel, shares, totals, squared, rank_flags)
    if not accepts(numbers.global_flags):
        return numbers._replace(updated=False)
    if clip_norm is not None:
        scale_gradients(parallel, clip_factor(numbers.gradient_norm, clip_norm))
    update(optimizer, lr)
    update_expert_biases(parallel, numbers.counts_LE)
    return numbers


@in_phase("backward")
def backward(share: Losses) -> None:
    """Gradients of one micro-batch, added to those of the others."""
    share.objective.backward()


@in_phase("update")
def update(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """AdamW."""
    set_learning_rate(optimizer, lr)
    optimizer.step()


def clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by."""
    return (clip_norm / (norm + 1e-6)).clamp(max=1.0)


@in_phase("forward")
def forward(parallel: Parallel, rows: Rows, totals: Totals, place: BatchPosition | None = None) -> Losses:
    """Losses of one micro-batch."""
    config = parallel.model.config
    place = (place or BatchPosition())._replace(row=rows.first)
    valid_BS, heads = rows.targets != IGNORE, head_losses(parallel, rows)
    (summed, *further), stats = parallel.model(rows.ids, valid_BS, head_losses=heads, position=place, documents_BS=rows.documents)
    share = losses(summed, stats, config.moe, totals, parallel.mesh)
    return add_mtp(share, further, config, totals, parallel.mesh)


def head_losses(parallel: Parallel, rows: Rows) -> list[HeadLoss]:
    """What the model makes of its hidden states: the cross entropy of the next token, and of those that modules predict further.

    Module d predicts at position i the target of i + d.
    """
    targets = (targets_ahead(rows, depth) for depth in range(parallel.model.config.mtp_depth + 1))
    return [partial(head_loss, targets=target_BS, ignore=IGNORE, axis=parallel.mesh.tensor) for target_BS in targets]


def update_expert_biases(parallel: Parallel, counts_LE: Tensor) -> None:
    """Once a step and from its global counts, so that every rank makes the same change."""
    rate = parallel.model.config.moe.balance.bias_rate
    if rate > 0:
        for bias_E, counts_E in zip(expert_biases(parallel.model).values(), counts_LE, strict=True):
            update_expert_bias(bias_E, counts_E, rate)


@in_phase("count")
def count_totals(parallel: Parallel, micro_batches: list[Rows]) -> Totals:
    """Valid tokens and sequences of the global batch: one small all-reduce over the data ranks.

    The host has counted this rank's rows before they went to the device. On a GPU nobody waits for the sums.
    """
    valid = [rows.valid or valid_targets(rows, parallel.model.config.mtp_depth) for rows in micro_batches]
    counts = [sum(len(rows.ids) for rows in micro_batches), *map(sum, zip(*valid, strict=True))]
    if kind_of(parallel.device) == "cuda":
        return totals_on_device(parallel, counts, len(micro_batches))
    if parallel.mesh.data.size > 1:
        counts = sum_over(torch.tensor(counts), parallel.mesh.data).tolist()
    sequences, tokens, *mtp_tokens = counts
    return Totals(max(1, tokens), sequences, len(micro_batches), tuple(max(1, count) for count in mtp_tokens))


def totals_on_device(parallel: Parallel, counts: list[int], micro_batches: int) -> Totals:
    """The same with scalars of the device. They are int64, so a loss that is divided by one keeps its type."""
    sums = sum_over(on_device(torch.tensor(counts), parallel.device), parallel.mesh.data)
    sequences, tokens, *mtp_tokens = sums.clamp(min=1).unbind()
    return Totals(tokens, sequences, micro_batches, tuple(mtp_tokens))


@in_phase("exchange")
def add_up(
    parallel: Parallel, shares: list[Losses], totals: Totals, squared: Tensor, rank_flags: RankFlags = NOTHING
) -> StepNumbers:
    """Add this rank's micro-batches and then all ranks: everything travels in one fp64 tensor (exact for counts below 2**53).

    Flags, loss and norm are read by the host here, and nothing else of the step: whether to update depends on them.
    """
    (layers, columns), depth, mesh = shares[0].counts_LE.shape, len(shares[0].mtp_D), parallel.mesh
    router_metrics_LG = torch.stack([s.router_metrics_LG for s in shares]).sum(0)
    parts = [
        (s.cross_entropy.view(1), s.balance_L, s.sequence_L, s.importance_L, s.z_L, s.dropped_L, s.mtp_D, s.counts_LE.flatten())
        for s in shares
    ]
    mine = torch.stack([torch.cat([part.double() for part in share]) for share in parts]).sum(0)
    mine = torch.cat([squared.view(1), mine])
    flags = numbers_of(rank_flags, mine, mesh.rank, mesh.world)
    everything = sum_over(torch.cat([flags, mine, router_metrics_LG.flatten()]), mesh.everyone)
    sizes = [len(flags), 1, 1, *[layers] * 5, depth, layers * columns, router_metrics_LG.numel()]
    flags, squared, cross_entropy, *per_layer, mtp_D, counts, router_metrics = everything.split(sizes)
    balance_L, sequence_L, importance_L, z_L, dropped_L = per_layer
    global_flags, tokens = read(everything[: len(flags) + 2], totals.tokens)
    return StepNumbers(
        tokens,
        cross_entropy.squeeze(0),
        balance_L,
        sequence_L,
        importance_L,
        z_L,
        counts.long().view(layers, columns),
        dropped_L.long(),
        mtp_D,
        squared.squeeze(0).sqrt(),
        global_flags,
        router_metrics_LG=router_metrics.view_as(router_metrics_LG),
        own_LP=own_peaks(shares, router_metrics_LG),
    )


def own_peaks(shares: list[Losses], router_metrics_LG: Tensor) -> Tensor:
    """(L, 2) of this rank alone, as its `router_metrics_LG`: largest logit of any micro-batch, rows of all of them."""
    if not router_metrics_LG.numel():
        return router_metrics_LG
    logit_max_L = torch.stack([s.logit_max_L for s in shares]).amax(0).double()
    return torch.stack([logit_max_L, router_metrics_LG[:, SUMS.index("rows")]], dim=1)
