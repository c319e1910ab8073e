"""The symmetric exchange: each row is put straight into the memory of its expert's rank, in the order of the experts.

The plain exchange reads on the host how many rows come from each rank. Here the memory has room for a fixed number of rows, so that
shapes are known beforehand; counts and places stay on the device. All ranks have equally many tokens.

When memory may be overwritten. A transfer is three things in the stream of each rank: it puts rows into the memory of the others,
enters a barrier, and copies what came out of its own memory. It always copies: nothing that the backward pass needs stays in this
memory, however many micro-batches (of a pipeline, or recomputed) lie between a forward pass and its backward pass. The memory has
two halves, which transfers use in turns. Let transfer t + 2 of this rank write into the half of transfer t of another rank. This
rank has passed the barrier of transfer t + 1, so the other has entered it, and had then done what comes before it in its stream:
the copy of transfer t. Hence one barrier for each transfer suffices. This needs that all ranks of the axis make the same transfers
in the same order, as they do collectives, and each in a single stream: nothing overlaps with a transfer.

Rounds. What has no room is dropped, or (`repairs`) comes in further rounds: round i brings the rows from i * `most` on in the order
that they have with room for all, so all rounds together bring what the plain exchange brings. All ranks know the counts of all
ranks, so their hosts read the same number of rounds: one if everything fits. The way back needs one.

T tokens, K choices of each, E experts, N ranks, L = E / N experts of a rank, D width, A rows that this rank plans (T * K, or with
padding those of each expert), C rows that its experts have room for.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...moe.device import host_read, kind_of
from ...moe.dispatch import (
    DispatchedTokens,
    Dispatcher,
    DispatcherOutput,
    ExpertsFn,
    OverlapFn,
    RowPlan,
    count_rows,
    experts_or_dropped,
    gather_rows,
    plan_choices,
    sum_rows,
    unpermute,
)
from ...moe.kernels import operators
from ...moe.recompute import keep
from ...moe.router import Routing
from ..collectives import stack_over
from ..layout import room
from ..mesh import Axis
from ..progress import waiting_for_device
from . import shared_memory

ALIGNMENT = 256
"""Bytes: halves of the memory begin at multiples of it."""


class Targets(NamedTuple):
    """Row i of this rank goes to row `row_R[i]` of rank `rank_R[i]` of the axis, or nowhere (-1). int64."""

    rank_R: Tensor
    row_R: Tensor


class SymmetricPlan(NamedTuple):
    """Where rows go to and come from. What one rank sends to row r of another is what that would send back from row r."""

    rows: RowPlan
    """The A rows of this rank, in the order of (expert, token). Choices without room are dropped."""
    there: Targets
    """Of the A rows."""
    back: Targets
    """Of the rows of this rank's experts, in the order of (expert, rank, token): C of them; on a CPU only those that come."""
    counts_L: Tensor
    """int64: rows of each of this rank's experts."""
    overflow: Tensor
    """int64 scalar: choices of this rank that found no room, in the first round."""
    most: int
    """Rows that any rank gets in a transfer."""
    rounds: int
    """Transfers on the way to the experts."""


def kept_counts(counts_NE: Tensor, most: int) -> Tensor:
    """Returns how many of each rank's choices of each expert, (N, E), find room if every rank has room for `most` rows.

    All experts of a rank get the same limit, the largest with which their rows fit, and keep the first rows in the order of (rank,
    token). For ascending totals t of L experts, the sum of min(t, x) is the least of t_1 + ... + t_k + (L - k) x, k <= L. So x is
    small enough if that of some k < L is at most `most`; k = L - 1 limits none if all fit.
    """
    ranks, experts = counts_NE.shape
    local = experts // ranks
    total_NL = counts_NE.sum(0).view(ranks, local).sort(1).values
    smaller_NL = total_NL.cumsum(1) - total_NL
    others_L = torch.arange(local, 0, -1, device=counts_NE.device)
    limit_N = torch.div(most - smaller_NL, others_L, rounding_mode="floor").amax(1)
    before_NE = counts_NE.cumsum(0) - counts_NE
    return (limit_N.repeat_interleave(local, output_size=experts) - before_NE).clamp(min=0).minimum(counts_NE)


def plan_targets(counts_NE: Tensor, kept_NE: Tensor, rank: int, rows: int) -> Targets:
    """Returns where the `rows` rows of this rank go, which are in the order of the experts: counts_NE[rank] of each."""
    ranks, experts = counts_NE.shape
    total_NL = kept_NE.sum(0).view(ranks, -1)
    first_E = (total_NL.cumsum(1) - total_NL).flatten() + kept_NE[:rank].sum(0)
    ends_E = counts_NE[rank].cumsum(0)
    index_A = torch.arange(rows, device=counts_NE.device)
    expert_A = torch.searchsorted(ends_E, index_A, right=True)
    known_A = expert_A.clamp(max=experts - 1)
    nth_A = index_A - (ends_E - counts_NE[rank])[known_A]
    goes_A = (expert_A < experts) & (nth_A < kept_NE[rank][known_A])
    return Targets((known_A // total_NL.shape[1]).masked_fill(~goes_A, -1), first_E[known_A] + nth_A)


def plan_return(counts_NE: Tensor, kept_NE: Tensor, rank: int, rows: int) -> Targets:
    """Returns where the `rows` rows of this rank's experts go: the inverse of `plan_targets` of all ranks."""
    ranks, experts = counts_NE.shape
    own = slice(rank * (experts // ranks), (rank + 1) * (experts // ranks))
    kept_LN = kept_NE[:, own].T.contiguous()
    first_LN = (counts_NE.cumsum(1) - counts_NE)[:, own].T
    ends = kept_LN.flatten().cumsum(0)
    index_C = torch.arange(rows, device=counts_NE.device)
    cell_C = torch.searchsorted(ends, index_C, right=True)
    known_C = cell_C.clamp(max=experts - 1)
    nth_C = index_C - (ends - kept_LN.flatten())[known_C]
    return Targets((known_C % ranks).masked_fill(cell_C >= experts, -1), first_LN.flatten()[known_C] + nth_C)


class Buffers:
    """The shared memory of an axis, which grows when more is needed, and whose half is next. Holds nothing between transfers."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.memory: shared_memory.SharedMemory | None = None
        self.half_bytes, self.turn = 0, 0
        self.addresses: list[Tensor] = []
        """Of each half, the address at each rank, (N,)."""

    def to_experts(self, rows: Tensor, index_R: Tensor | None, plan: SymmetricPlan) -> Tensor:
        """Returns the rows of this rank's experts of all ranks' rows[index_R], (A, ...). Collective."""
        if plan.rounds == 1:
            return self.transfer(rows, index_R, plan.there, plan.back, plan.most)
        came = []
        for first in range(0, plan.rounds * plan.most, plan.most):
            row_A = plan.there.row_R - first
            there = Targets(plan.there.rank_R.masked_fill((row_A < 0) | (row_A >= plan.most), -1), row_A)
            arriving = Targets(*(x[first : first + plan.most] for x in plan.back))
            came.append(self.transfer(rows, index_R, there, arriving, plan.most))
        return torch.cat(came)

    def to_tokens(self, rows: Tensor, plan: SymmetricPlan) -> Tensor:
        """Returns, from the rows of all ranks' experts, those of this rank's tokens, (A, ...). Collective."""
        return self.transfer(rows, None, plan.back, plan.there, plan.most)

    def transfer(self, rows: Tensor, index_R: Tensor | None, targets: Targets, arriving: Targets, most: int) -> Tensor:
        """Puts rows[index_R], (R, ...), at their targets. Returns the rows that came, zeros where none did.

        `arriving`: the targets of the way back, so row i comes if `arriving` sends row i. Collective.
        """
        rows = rows.contiguous()
        self._make_room(max(most, 1) * _row_bytes(rows), rows.device)
        assert self.memory is not None
        own = self._view(self.axis.rank, arriving.rank_R, rows)
        if kind_of(rows) == "cpu":
            for rank in range(self.axis.size):
                there = (targets.rank_R == rank).nonzero().flatten()
                moved = rows.index_select(0, there if index_R is None else index_R[there])
                self._view(rank, None, rows).index_copy_(0, targets.row_R[there], moved)
        else:
            operators.put_rows(rows, index_R, *targets, self.addresses[self.turn], own)
        self.memory.barrier()
        self.turn = 1 - self.turn
        came = (arriving.rank_R >= 0).view(-1, *[1] * (rows.ndim - 1))
        return torch.where(came, own, own.new_zeros(()))

    def _view(self, rank: int, of: Tensor | None, like: Tensor) -> Tensor:
        """Returns the rows of the current half at `rank`: as many as `of` has, or all."""
        assert self.memory is not None
        rows = self.half_bytes // _row_bytes(like) if of is None else len(of)
        start = self.turn * self.half_bytes
        return self.memory.peers[rank][start : start + rows * _row_bytes(like)].view(like.dtype).view(rows, *like.shape[1:])

    def _make_room(self, size: int, device: torch.device) -> None:
        """Gets larger memory if a half has less than `size` bytes. Nobody puts rows into the old one: all ranks come to this."""
        if size <= self.half_bytes:
            return
        self.half_bytes, self.turn = -(-size // ALIGNMENT) * ALIGNMENT, 0
        self.memory = shared_memory.open_memory(self.axis, 2 * self.half_bytes, device)
        addresses = self.memory.addresses()
        self.addresses = [addresses, addresses + self.half_bytes]


def _row_bytes(rows: Tensor) -> int:
    return math.prod(rows.shape[1:]) * rows.element_size()


class _ToExperts(torch.autograd.Function):
    """Tokens (T, D) to the rows of this rank's experts."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, buffers: Buffers, plan: SymmetricPlan) -> Tensor:
        _save(ctx, buffers, plan)
        if plan.rows.filled_R is None:
            return keep(partial(buffers.to_experts, x_TD, plan.rows.token_R, plan))
        return keep(lambda: buffers.to_experts(gather_rows(x_TD, plan.rows), None, plan))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        plan = _saved(ctx)
        return sum_rows(ctx.buffers.to_tokens(grads[0], plan), plan.rows), None, None


class _ToTokens(torch.autograd.Function):
    """Outputs of this rank's experts to the rows of this rank's tokens, (A, D)."""

    @staticmethod
    def forward(ctx: Any, y_CD: Tensor, buffers: Buffers, plan: SymmetricPlan) -> Tensor:
        _save(ctx, buffers, plan)
        return keep(partial(buffers.to_tokens, y_CD, plan))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.buffers.to_experts(grads[0], None, _saved(ctx)), None, None


def _save(ctx: Any, buffers: Buffers, plan: SymmetricPlan) -> None:
    ctx.buffers, ctx.numbers = buffers, (plan.most, plan.rounds)
    ctx.save_for_backward(*plan.rows, *plan.there, *plan.back, plan.counts_L, plan.overflow)


def _saved(ctx: Any) -> SymmetricPlan:
    *rows, rank_A, row_A, rank_C, row_C, counts_L, overflow = ctx.saved_tensors
    return SymmetricPlan(RowPlan(*rows), Targets(rank_A, row_A), Targets(rank_C, row_C), counts_L, overflow, *ctx.numbers)


class SymmetricDispatcher(Dispatcher):
    """Has memory, but keeps nothing in it from one call to the next."""

    def __init__(self, experts: int, axis: Axis, rows: float, repairs: bool = False) -> None:
        """`rows`: the room of each rank, as a multiple of the rows that it gets if all experts are equally loaded.

        `repairs`: choices without room come in further rounds, whose number the host reads; else they are dropped.
        """
        self.experts, self.axis, self.rows, self.repairs = experts, axis, rows, repairs
        self.buffers = Buffers(axis)

    def dispatch(self, x_TD: Tensor, routing: Routing) -> DispatchedTokens:
        plan, keys_C = self._plan(routing), None
        tokens_CD: Any = _ToExperts.apply(x_TD, self.buffers, plan)
        if routing.keys_T is not None:
            keys_C = keep(partial(self.buffers.to_experts, routing.keys_T, plan.rows.token_R, plan))
        return DispatchedTokens(tokens_CD, plan.counts_L, (plan, routing.weights_TK), keys_C)

    def combine(self, y_RD: Tensor, dispatched: DispatchedTokens) -> Tensor:
        plan, weights_TK = dispatched.metadata
        rows_AD: Any = _ToTokens.apply(y_RD, self.buffers, plan)
        return unpermute(rows_AD, weights_TK, plan.rows)

    def run(self, x_TD: Tensor, routing: Routing, experts: ExpertsFn, overlap_fn: OverlapFn) -> DispatcherOutput:
        dispatched = self.dispatch(x_TD, routing)
        overlapped, plan = overlap_fn()(), dispatched.metadata[0]
        y_TD = self.combine(dispatched.through(experts), dispatched)
        return DispatcherOutput(y_TD, overlapped, plan.counts_L.sum(), plan.overflow)

    def _room(self, routing: Routing) -> int:
        if routing.padded_rows is not None:  # every expert has as many
            return self.experts * routing.padded_rows
        tokens, top_k = routing.experts_TK.shape
        return room(tokens, top_k, self.experts, self.axis.size, self.rows)

    def _plan(self, routing: Routing) -> SymmetricPlan:
        experts_TK, dropping = experts_or_dropped(routing, self.experts), routing.kept_TK is not None
        counted = count_rows(experts_TK, self.experts)
        plan = plan_choices(experts_TK, self.experts, routing.padded_rows, dropping, counted, cut=False)
        counts_NE, room = stack_over(plan.counts_E, self.axis), self._room(routing)
        most, rounds = max(len(plan.token_R), room), 1
        kept_NE = kept_counts(counts_NE, most if self.repairs else room)
        overflow = (counts_NE - kept_NE)[self.axis.rank].sum()
        if self.repairs:
            kept_NE, rounds = counts_NE, self._read_rounds(counts_NE, max(most, 1))
            room = rounds * most
        first = self.axis.rank * self.experts // self.axis.size
        counts_L = kept_NE[:, first : first + self.experts // self.axis.size].sum(0)
        arriving = int(counts_L.sum()) if kind_of(counts_L) == "cpu" else room
        there = plan_targets(counts_NE, kept_NE, self.axis.rank, len(plan.token_R))
        back = plan_return(counts_NE, kept_NE, self.axis.rank, arriving)
        kept_TK = plan.slot_TK >= 0
        if len(plan.token_R):
            kept_TK = kept_TK & (there.rank_R >= 0)[plan.slot_TK.clamp(min=0)]
        rows = plan._replace(slot_TK=plan.slot_TK.masked_fill(~kept_TK, -1), kept_TK=kept_TK)
        return SymmetricPlan(rows, there, back, counts_L, overflow, most, rounds)

    def _read_rounds(self, counts_NE: Tensor, most: int) -> int:
        """Returns how many rounds of `most` rows bring the rows of every rank (a synchronisation)."""
        rows = counts_NE.sum(0).view(self.axis.size, -1).sum(1).amax()
        rounds = torch.div(rows + most - 1, most, rounding_mode="floor").clamp(min=1)
        with waiting_for_device():
            return host_read(rounds, "rounds of the exchange", lambda: 1)
