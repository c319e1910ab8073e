"""The plain exchange: a row for each token and chosen expert, to the rank of the expert and back.

As in GShard, but dropless as in MegaBlocks: the counts are exchanged first, then the rows, by all-to-alls with uneven splits. The
weights stay on the rank of the token.
N ranks of the axis, E experts, L = E / N experts of a rank, R rows that leave this rank, A rows that it receives.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...moe.device import host_read, hot_rows
from ...moe.dispatch import DispatchedTokens, RowPlan, count_rows, experts_or_dropped, permute, plan_choices, unpermute
from ...moe.router import Routing
from ..mesh import Axis
from ..progress import waiting_for_device
from .async_collectives import AllToAll, PendingRows
from .base import ExpertParallelDispatcher


class Splits(NamedTuple):
    """The numbers of rows for and from each rank."""

    send_N: list[int]
    receive_N: list[int]


class ExpertOrder(NamedTuple):
    """`rows[order_A]` sorts received rows by expert; `inverse_A` is the inverse permutation."""

    order_A: Tensor
    inverse_A: Tensor


class StartedAllToAll(NamedTuple):
    """Rows under way, to the experts or back, and what combine needs to know about them."""

    rows: PendingRows
    plan: RowPlan
    weights_TK: Tensor
    received_NL: Tensor
    splits: Splits
    keys: PendingRows | None
    """The random keys of the rows; None without dropout inside of the experts."""


class AllToAllDispatcher(ExpertParallelDispatcher):
    """Sends rows sorted by expert, which sorts them by rank too.

    What needs no other rank is computed while the counts travel, the rest of the plan while the rows do.
    """

    def __init__(self, experts: int, axis: Axis, chunks: int = 1) -> None:
        super().__init__(chunks)
        self.experts = experts
        self.axis = axis

    def start_dispatch(self, x_TD: Tensor, routing: Routing) -> StartedAllToAll:
        experts_TK = experts_or_dropped(routing, self.experts)
        counted = count_rows(experts_TK, self.experts)
        counts_E = counted.counts_E
        sent_E = counts_E if routing.padded_rows is None else torch.full_like(counts_E, routing.padded_rows)
        local = [self.experts // self.axis.size] * self.axis.size
        counts = AllToAll(local, local, self.axis).start(sent_E)
        plan = plan_choices(experts_TK, self.experts, routing.padded_rows, routing.kept_TK is not None, counted)
        rows_RD = permute(x_TD, plan)
        sent_NL, received_NL = sent_E.view(self.axis.size, -1), counts.wait().view(self.axis.size, -1)
        splits = read_splits(sent_NL, received_NL, len(rows_RD))
        route, keys = AllToAll(*splits, self.axis), None
        rows = route.start(rows_RD, narrow=self.narrow)
        if routing.keys_T is not None:
            keys = route.start(routing.keys_T.index_select(0, plan.token_R))
        return StartedAllToAll(rows, plan, routing.weights_TK, received_NL, splits, keys)

    def finish_dispatch(self, started: StartedAllToAll) -> DispatchedTokens:
        order, counts_L = plan_expert_order(started.received_NL, sum(started.splits.receive_N)), started.received_NL.sum(0)
        keys_R = None if started.keys is None else started.keys.wait().index_select(0, order.order_A)
        return DispatchedTokens(reorder(started.rows.wait(), *order), counts_L, (started, order), keys_R)

    def start_combine(self, y_RD: Tensor, dispatched: DispatchedTokens) -> StartedAllToAll:
        started, order = dispatched.metadata
        send_N, receive_N = started.splits
        rows_AD = reorder(y_RD, order.inverse_A, order.order_A)
        return started._replace(rows=AllToAll(receive_N, send_N, self.axis).start(rows_AD))

    def finish_combine(self, started: StartedAllToAll) -> Tensor:
        return unpermute(started.rows.wait(), started.weights_TK, started.plan)


def read_splits(sent_NL: Tensor, received_NL: Tensor, rows: int) -> Splits:
    """Reads the splits on the host (a synchronisation).

    A dry run assumes that `rows` leave this rank, an equal number to each rank, and that as many are received (or `hot_rows`).
    """
    sums, ranks = torch.stack([sent_NL, received_NL]).sum(-1), len(sent_NL)
    even = [rows * (rank + 1) // ranks - rows * rank // ranks for rank in range(ranks)]
    with waiting_for_device():
        return Splits(*host_read(sums, "rows of each rank", lambda: [even, list(map(hot_rows, even))]))


def plan_expert_order(received_NL: Tensor, rows: int) -> ExpertOrder:
    """Returns the permutation of `rows` rows from (rank, expert) order to (expert, rank) order."""
    received_LN = received_NL.T.contiguous()
    ends_by_rank_NL = received_NL.flatten().cumsum(0).view_as(received_NL)
    ends_by_expert_LN = received_LN.flatten().cumsum(0).view_as(received_LN)
    shift_LN = ends_by_expert_LN - ends_by_rank_NL.T
    index_A = torch.arange(rows, device=received_NL.device)
    order_A = index_A - torch.repeat_interleave(shift_LN.flatten(), received_LN.flatten(), output_size=rows)
    return ExpertOrder(order_A, torch.empty_like(order_A).index_copy_(0, order_A, index_A))


def reorder(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Returns rows[order]. `inverse` is the inverse permutation, which makes the gradient a gather too."""
    return _Reorder.apply(rows, order, inverse)  # pyright: ignore[reportReturnType]


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None
