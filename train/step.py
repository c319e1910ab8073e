"""One optimizer step: micro-batches, backward, reduction, norm, clip, update, expert bias."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batches import IGNORE
from ..moe.balance import update_expert_bias
from ..moe.deferred import deferred_weight_gradients
from ..moe.device import kind_of
from ..moe.init import expert_biases
from ..moe.model import HeadLoss
from ..moe.router_metrics import SUMS
from ..moe.token_info import BatchPosition
from ..moe.weight_cast import shared_casts
from ..parallel.apply import Parallel
from ..parallel.collectives import sum_over
from ..parallel.config import Overflow
from ..parallel.context import own_chunks
from ..parallel.fsdp import end_deferred_gradients, prepare_backward
from ..parallel.gradients import clip_factor, gradient_all_reduce, scale_gradients, squared_norm
from ..parallel.mesh import Axis
from ..parallel.pipeline.p2p import StageMessage
from ..parallel.pipeline.run import Pipeline, StageResult, run_forward, run_schedule
from ..parallel.pipeline.schedule import WEIGHTS, Action
from ..parallel.pipeline.stage_model import between_stages
from ..parallel.progress import in_phase
from ..parallel.streams import on_device
from ..parallel.vocabulary import head_loss
from .attention_logits import clip_heads, watching
from .batch import Rows, targets_ahead, valid_targets
from .loss import (
    LAYER_FIELDS,
    Losses,
    Totals,
    add_mtp,
    add_pooled_balance,
    add_shares,
    among_all_layers,
    losses,
    pooled_sums,
    without_graph,
)
from .optimizer import set_learning_rate
from .step_flags import NO_FLAGS, GlobalFlags, RankFlags, encode_flags, is_sound, read_flags


class StepInput(NamedTuple):
    """The arguments of a step: this rank's part of a global batch, and how to update."""

    rows: list[Rows]
    """This rank's micro-batches."""
    lr: float
    clip_norm: float | None
    position: BatchPosition | None = None
    """The step and seed of the run, for capacity schedules and random routing; None: the first step."""
    rank_flags: RankFlags = NO_FLAGS
    """This rank's flags for the others."""
    accepts: Callable[[GlobalFlags], bool] = is_sound
    """Decides, by the same numbers on every rank, whether to update."""
    overlap_fn: Callable[[], None] = lambda: None
    """Called when the device has the whole step to do and before the host waits for it."""
    qk_clip: float | None = None
    """The largest attention logit that a head may have (`optimizer.qk_clip`)."""


class StepNumbers(NamedTuple):
    """The results of a step over the global batch, the same on every rank and every layout. Fp64 and int64 tensors.

    L layers that route, E router columns, D modules of multi-token prediction, G router metrics, P peaks.
    """

    tokens: int
    """Valid tokens."""
    cross_entropy: Tensor
    balance_L: Tensor
    sequence_L: Tensor
    device_L: Tensor
    communication_L: Tensor
    importance_L: Tensor
    z_L: Tensor
    counts_LE: Tensor
    """Choices of each expert before any is dropped; null experts are the last columns."""
    dropped_L: Tensor
    mtp_D: Tensor
    """Cross entropy of each module of multi-token prediction."""
    gradient_norm: Tensor
    """Before clipping."""
    global_flags: GlobalFlags
    """On the host: loss, norm, and the flags of all ranks."""
    updated: bool = True
    """False: weights and moments are bit for bit what they were before the step."""
    router_metrics_LG: Tensor = torch.empty(0, 0)
    """Sums of router metrics (moe/router.py); without columns if the routers do not collect them."""
    local_peaks_LP: Tensor = torch.empty(0, 0)
    """Those of THIS RANK, unlike the rest: its largest absolute router logit, and the rows that its experts computed. Fp64."""
    overflow_L: Tensor = torch.empty(0, dtype=torch.int64)
    """Choices that the exchange had no room for; without elements if it has room for all."""
    qk_clip_2: Tensor = torch.empty(0)
    """The largest attention logit and the number of heads that were clipped by it; without elements if none ever is."""


AccumulateFn = Callable[[Parallel, StepInput, Totals], list[Losses]]


def train_step(
    parallel: Parallel, optimizer: torch.optim.Optimizer, step_input: StepInput, accumulate_fn: AccumulateFn | None = None
) -> StepNumbers:
    """Trains on one global batch. All ranks update, or none does. `accumulate_fn` takes the place of `accumulate`."""
    optimizer.zero_grad(set_to_none=True)
    totals = count_totals(parallel, step_input.rows)
    with nullcontext(torch.empty(0)) if (most := step_input.qk_clip) is None else watching(parallel) as logits_AH:
        shares = (accumulate_fn or accumulate)(parallel, step_input, totals)
    squared = squared_norm(parallel)
    step_input.overlap_fn()
    numbers = add_up(parallel, shares, totals, squared, step_input.rank_flags)
    if not step_input.accepts(numbers.global_flags):
        return numbers._replace(updated=False)
    if step_input.clip_norm is not None:
        scale_gradients(parallel, clip_factor(numbers.gradient_norm, step_input.clip_norm))
    update(optimizer, step_input.lr)
    update_expert_biases(parallel, numbers.counts_LE, step_input.position)
    return numbers if most is None else numbers._replace(qk_clip_2=clip_heads(parallel, logits_AH, most))


def accumulate(parallel: Parallel, step_input: StepInput, totals: Totals) -> list[Losses]:
    """Runs forward and backward of all micro-batches, which add up gradients, and returns the losses of each."""
    with shared_casts() if len(step_input.rows) > 1 and not parallel.recompute else nullcontext():
        if parallel.pipeline is not None:
            return pipeline_pass(parallel, parallel.pipeline, step_input, totals)
        shares = []
        for index, rows in enumerate(step_input.rows):
            last = index == len(step_input.rows) - 1
            prepare_backward(parallel.model, parallel.zero, last)
            share = forward(parallel, rows, totals, step_input.position)
            with gradient_all_reduce(parallel) if last else nullcontext():
                backward(share)
            shares.append(without_graph(share))
        return shares


@in_phase("backward")
def backward(share: Losses) -> None:
    """Adds the gradients of one micro-batch to those of the others."""
    share.objective.backward()


@in_phase("update")
def update(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Updates the weights."""
    set_learning_rate(optimizer, lr)
    optimizer.step()


@in_phase("forward")
def forward(parallel: Parallel, rows: Rows, totals: Totals, position: BatchPosition | None = None) -> Losses:
    """Returns the losses of one micro-batch."""
    if parallel.pipeline is not None:
        return forward_stages(parallel, parallel.pipeline, rows, totals, position)
    config = parallel.model.config
    position = (position or BatchPosition())._replace(row=rows.first)
    moe = config.moe.at(position.step)
    valid_BS, heads = rows.targets != IGNORE, head_losses(parallel, rows)
    (summed, *further), stats = parallel.model(
        rows.ids, valid_BS, head_losses=heads, position=position, documents_BS=rows.documents
    )
    share = losses(summed, stats, moe, totals, parallel.mesh)
    share = add_pooled_balance(share, pooled_sums(stats, moe), moe, totals, parallel.mesh)
    return add_mtp(share, further, config, totals, parallel.mesh)


def pipeline_pass(parallel: Parallel, pipeline: Pipeline, step_input: StepInput, totals: Totals) -> list[Losses]:
    """Runs forward and backward of all micro-batches through this rank's stages. Returns the shares of each."""
    micro_batches, shares = step_input.rows, list[Losses]()

    def forward(stage: int, micro: int, received: StageMessage | None) -> StageResult:
        output, share = forward_stage(parallel, pipeline, stage, received, micro_batches[micro], totals, step_input.position)
        shares.append(without_graph(share))
        return StageResult(output, share.objective)

    model, end_of = parallel.model, {each.stage: each for unit in pipeline.units(len(micro_batches)) for each in unit}
    blocks = list(zip(map(pipeline.stage_of, model.block_indices), model.blocks, strict=True))
    pipeline.ended.clear()

    @contextmanager
    def around(action: Action, last: bool) -> Iterator[None]:
        if action == end_of[action.stage]:
            if not pipeline.ended:
                until_all_end.enter_context(gradient_all_reduce(parallel))
            pipeline.ended.add(action.stage)
        ended = [block for stage, block in blocks if stage in pipeline.ended]
        deferred = action.kind == WEIGHTS
        prepare_backward(model, parallel.zero, last, ended, sums=deferred or not pipeline.defers_weights)
        yield
        if deferred:
            end_deferred_gradients(model)

    likes = between_stages(parallel.model, parallel.mesh, pipeline, micro_batches[0].ids)
    with ExitStack() as until_all_end, deferred_weight_gradients() if pipeline.defers_weights else nullcontext([]) as deferred:
        run_schedule(pipeline, len(micro_batches), likes, forward, around, deferred)
    return shares


def forward_stages(parallel: Parallel, pipeline: Pipeline, rows: Rows, totals: Totals, position: BatchPosition | None) -> Losses:
    """Returns the losses of one micro-batch in this rank's stages."""
    shares = []

    def forward(stage: int, received: StageMessage | None) -> StageMessage:
        output, share = forward_stage(parallel, pipeline, stage, received, rows, totals, position)
        shares.append(share)
        return output

    run_forward(pipeline, between_stages(parallel.model, parallel.mesh, pipeline, rows.ids), forward)
    return add_shares(shares)


def forward_stage(
    parallel: Parallel,
    pipeline: Pipeline,
    stage: int,
    received: StageMessage | None,
    rows: Rows,
    totals: Totals,
    position: BatchPosition | None,
) -> tuple[StageMessage, Losses]:
    """Returns what the next stage takes, and the stage's share of the losses of one micro-batch."""
    config, mesh = parallel.model.config, parallel.mesh
    position = (position or BatchPosition())._replace(row=rows.first)
    moe = config.moe.at(position.step)
    output, summed, stats = parallel.model(
        rows.ids,
        rows.targets != IGNORE,
        stage=stage,
        received=received,
        head_losses=head_losses(parallel, rows),
        position=position,
        documents_BS=rows.documents,
    )
    none = output.x_BSD.new_zeros((), dtype=torch.promote_types(output.x_BSD.dtype, torch.float32))
    share = losses(summed[0] if summed else none, stats, moe, totals, mesh)
    share = add_mtp(share, summed[1:], config, totals, mesh)
    training, columns = parallel.model.training, moe.experts + moe.router.null_experts
    layers = pipeline.moe_layers - (0 if training else pipeline.predicting)
    rows_L = [row for row in pipeline.rows[stage] if row < layers]
    depth, metrics = (config.mtp_depth, len(SUMS) * pipeline.collects_metrics) if training else (0, 0)
    share = among_all_layers(share, rows_L, layers, columns, depth, metrics)
    pooled = [each for each in (received and received.pooled_LBC, pooled_sums(stats, moe)) if each is not None]
    output = output._replace(pooled_LBC=torch.cat(pooled) if pooled else None)
    if stage == pipeline.last:
        share = add_pooled_balance(share, output.pooled_LBC, moe, totals, mesh)
    return output, share


def head_losses(parallel: Parallel, rows: Rows) -> list[HeadLoss]:
    """Returns the cross entropy of the next token, and of the tokens further ahead that each module predicts.

    Module d predicts at position i the target of i + d.
    """
    targets = [targets_ahead(rows, depth) for depth in range(parallel.model.config.mtp_depth + 1)]
    if parallel.mesh.sizes["context"] > 1:
        targets = [own_chunks(target_BS, parallel.mesh.context) for target_BS in targets]
    loss = partial(head_loss, ignore=IGNORE, axis=parallel.mesh.tensor)
    return [partial(loss, targets=targets[0], scores_2T=rows.scores), *(partial(loss, targets=each) for each in targets[1:])]


def update_expert_biases(parallel: Parallel, counts_LE: Tensor, position: BatchPosition | None) -> None:
    """Moves the expert biases once a step, by its global counts, so that every rank makes the same change."""
    rate = parallel.model.config.moe.at((position or BatchPosition()).step).balance.bias_rate
    if rate > 0:
        rows = range(len(counts_LE)) if parallel.pipeline is None else parallel.pipeline.all_rows
        for bias_E, row in zip(expert_biases(parallel.model).values(), rows, strict=True):
            update_expert_bias(bias_E, counts_LE[row], rate)


@in_phase("count")
def count_totals(parallel: Parallel, micro_batches: list[Rows]) -> Totals:
    """Counts the valid tokens and sequences of the global batch: one small all-reduce, to which one rank of each row adds its own.

    The host has counted this rank's rows before they went to the device. On a GPU the sums stay there as scalars, so the host does
    not wait for them; they are int64, so a loss that is divided by one keeps its type.
    """
    valid = [rows.valid or valid_targets(rows, parallel.model.config.mtp_depth) for rows in micro_batches]
    counts = [sum(len(rows.ids) for rows in micro_batches), *map(sum, zip(*valid, strict=True))]
    mesh = parallel.mesh
    everyone = mesh.everyone if mesh.data.size > 1 else Axis(1, 0, None)
    if everyone.size > 1 and (mesh.sequence.rank or mesh.place("pipeline").rank):
        counts = [0] * len(counts)
    if kind_of(parallel.device) == "cuda":
        sums = sum_over(on_device(torch.tensor(counts), parallel.device), everyone)
        sequences, tokens, *mtp_tokens = sums.clamp(min=1).unbind()
        return Totals(tokens, sequences, len(micro_batches), tuple(mtp_tokens))
    if everyone.size > 1:
        counts = sum_over(torch.tensor(counts), everyone).tolist()
    sequences, tokens, *mtp_tokens = counts
    return Totals(max(1, tokens), sequences, len(micro_batches), tuple(max(1, count) for count in mtp_tokens))


@in_phase("exchange")
def add_up(
    parallel: Parallel, shares: list[Losses], totals: Totals, squared: Tensor, rank_flags: RankFlags = NO_FLAGS
) -> StepNumbers:
    """Adds up this rank's micro-batches and then all ranks: one fp64 tensor, exact for counts below 2**53, in one all-reduce.

    The host reads flags, loss and norm here, because they decide whether to update, and nothing else of the step.
    """
    (layers, columns), depth, mesh = shares[0].counts_LE.shape, len(shares[0].mtp_D), parallel.mesh
    router_metrics_LG = torch.stack([s.router_metrics_LG for s in shares]).sum(0)
    parts = [
        (s.cross_entropy.view(1), *(getattr(s, name) for name in LAYER_FIELDS), s.mtp_D, s.counts_LE.flatten()) for s in shares
    ]
    mine = torch.stack([torch.cat([part.double() for part in share]) for share in parts]).sum(0)
    mine = torch.cat([squared.view(1), mine])
    flags = encode_flags(rank_flags, mine, mesh.rank, mesh.world)
    overflow_L = torch.stack([s.overflow_L for s in shares]).sum(0).double() if parallel.overflow else mine.new_empty(0)
    everything = sum_over(torch.cat([flags, mine, router_metrics_LG.flatten(), overflow_L]), mesh.everyone)
    sizes = [len(flags), 1, 1, *[layers] * len(LAYER_FIELDS), depth, layers * columns, router_metrics_LG.numel(), len(overflow_L)]
    flags, squared, cross_entropy, *per_layer, mtp_D, counts, router_metrics, overflow_L = everything.split(sizes)
    balance_L, sequence_L, device_L, communication_L, importance_L, z_L, dropped_L = per_layer
    fatal = overflow_L.sum() if parallel.overflow is Overflow.fatal else None
    global_flags, tokens = read_flags(everything[: len(flags) + 2], totals.tokens, fatal)
    return StepNumbers(
        tokens,
        cross_entropy.squeeze(0),
        balance_L,
        sequence_L,
        device_L,
        communication_L,
        importance_L,
        z_L,
        counts.long().view(layers, columns),
        dropped_L.long(),
        mtp_D,
        squared.squeeze(0).sqrt(),
        global_flags,
        router_metrics_LG=router_metrics.view_as(router_metrics_LG),
        local_peaks_LP=local_peaks(shares, router_metrics_LG),
        overflow_L=overflow_L.long(),
    )


def local_peaks(shares: list[Losses], router_metrics_LG: Tensor) -> Tensor:
    """Returns (L, 2) of this rank alone: the largest logit of any micro-batch, and the rows of all of them."""
    if not router_metrics_LG.numel():
        return router_metrics_LG
    logit_max_L = torch.stack([s.logit_max_L for s in shares]).amax(0).double()
    return torch.stack([logit_max_L, router_metrics_LG[:, SUMS.index("rows")]], dim=1)
