"""The plain exchange: a row for each token and chosen expert, to the rank of the expert and back.

GShard's, dropless as in MegaBlocks. The counts are exchanged first, then the rows, by all-to-alls with uneven splits. The
weights stay at home.
N ranks of the axis, E experts, L = E / N experts of a rank, R rows that leave this rank, A rows that arrive at it.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...moe.device import host_read
from ...moe.dispatch import Arrived, plan_rows
from ...moe.router import Routing
from ...moe.rows import Plan, copy_to_rows, weighted_sum
from ..mesh import Axis
from ..pulse import collective, waiting, waiting_for_device
from .exchanging import ExchangingDispatcher
from .flights import Exchange, Flight, depart, land


class Splits(NamedTuple):
    """How many rows went to and came from each rank, and the order in which arrived rows meet their experts."""

    sent_N: list[int]
    came_N: list[int]
    order_A: Tensor
    back_A: Tensor


class Sent(NamedTuple):
    """What stays here while rows travel, there or back."""

    flight: Flight
    plan: Plan
    weights_TK: Tensor
    counts_L: Tensor
    splits: Splits


class PlainDispatcher(ExchangingDispatcher):
    """Rows to the ranks of their experts: sorted by expert, they are sorted by rank too."""

    def __init__(self, experts: int, axis: Axis, chunks: int = 1) -> None:
        super().__init__(chunks)
        self.experts = experts
        self.axis = axis

    def send(self, x_TD: Tensor, routing: Routing) -> Sent:
        plan = plan_rows(routing, self.experts)
        came_E = torch.empty_like(plan.counts_E)
        with collective("all_to_all", self.axis):
            counts = dist.all_to_all_single(came_E, plan.counts_E, group=self.axis.group, async_op=True)
        rows_RD = copy_to_rows(x_TD, plan)  # while the counts travel
        assert counts is not None
        with waiting(f"all_to_all of counts over {self.axis.size} ranks"):
            counts.wait()
        came_NL = came_E.view(self.axis.size, -1)
        splits = plan_splits(plan.counts_E.view(self.axis.size, -1), came_NL, len(rows_RD))
        flight = depart(rows_RD, Exchange(splits.sent_N, splits.came_N, self.axis))
        return Sent(flight, plan, routing.weights_TK, came_NL.sum(0), splits)

    def receive(self, sent: Sent) -> Arrived:
        tokens_AD = reorder(land(sent.flight), sent.splits.order_A, sent.splits.back_A)
        return Arrived(tokens_AD, sent.counts_L, sent)

    def send_back(self, y_RD: Tensor, arrived: Arrived) -> Sent:
        sent: Sent = arrived.way_back
        rows_AD = reorder(y_RD, sent.splits.back_A, sent.splits.order_A)
        return sent._replace(flight=depart(rows_AD, Exchange(sent.splits.came_N, sent.splits.sent_N, self.axis)))

    def receive_back(self, sent: Sent) -> Tensor:
        return weighted_sum(land(sent.flight), sent.weights_TK, sent.plan)


def plan_splits(sent_NL: Tensor, came_NL: Tensor, rows: int) -> Splits:
    """Splits on the host (a synchronisation), and the permutation from (rank, expert) order to (expert, rank) order.

    A dry run assumes that `rows` leave this rank, the same number to each, and as many come.
    """
    sums = torch.stack([sent_NL.sum(1), came_NL.sum(1)])
    with waiting_for_device():
        sent, came = host_read(sums, "rows of each rank", lambda: [even(rows, len(sums[0]))] * 2)
    rank_major = came_NL.flatten()
    starts = (rank_major.cumsum(0) - rank_major).view_as(came_NL).T.flatten()
    lengths = came_NL.T.flatten()
    ends = lengths.cumsum(0)
    arrived = sum(came)
    shift = torch.repeat_interleave(starts - (ends - lengths), lengths, output_size=arrived)
    order_A = torch.arange(arrived, device=shift.device) + shift
    back_A = torch.empty_like(order_A)
    back_A[order_A] = torch.arange(arrived, device=shift.device)
    return Splits(sent, came, order_A, back_A)


def even(rows: int, ranks: int) -> list[int]:
    """`rows` shared out evenly."""
    return [rows * (rank + 1) // ranks - rows * rank // ranks for rank in range(ranks)]


def reorder(rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """rows[order], where `back` is the inverse permutation: its gradient is a gather too."""
    return _Reorder.apply(rows, order, back)  # pyright: ignore[reportReturnType]


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None
