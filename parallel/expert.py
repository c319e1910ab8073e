"""Expert parallelism: each rank of the expert axis holds a run of experts, and token rows travel to them and back.

The counts are exchanged first, then the rows, by all-to-alls with uneven splits (GShard; dropless as in MegaBlocks).
N ranks of the axis, E experts, L = E / N experts of a rank, R rows that leave this rank, A rows that arrive at it.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..moe.dispatch import Arrived, Dispatcher, copy_to_rows, plan_rows, weighted_sum
from ..moe.router import Routing
from .collectives import exchange_rows
from .mesh import Axis


class Exchange(NamedTuple):
    """How many rows went to and came from each rank, and the order in which arrived rows meet their experts."""

    sent_N: list[int]
    came_N: list[int]
    order_A: Tensor
    back_A: Tensor


class ExchangeDispatcher(Dispatcher):
    """Rows to the ranks of their experts: sorted by expert, they are sorted by rank too."""

    def __init__(self, experts: int, axis: Axis) -> None:
        self.experts = experts
        self.axis = axis

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Arrived:
        plan = plan_rows(routing, self.experts)
        came_NL = self._exchange_counts(plan.counts_E)
        exchange = plan_exchange(plan.counts_E.view(self.axis.size, -1), came_NL)
        rows_AD = exchange_rows(copy_to_rows(x_TD, plan), exchange.sent_N, exchange.came_N, self.axis)
        tokens_AD = reorder(rows_AD, exchange.order_A, exchange.back_A)
        return Arrived(tokens_AD, came_NL.sum(0), plan, routing.weights_TK, exchange)

    def combine(self, y_RD: Tensor, arrived: Arrived) -> Tensor:
        exchange: Exchange = arrived.exchange
        y_AD = reorder(y_RD, exchange.back_A, exchange.order_A)
        rows_RD = exchange_rows(y_AD, exchange.came_N, exchange.sent_N, self.axis)
        return weighted_sum(rows_RD, arrived.weights_TK, arrived.plan)

    def _exchange_counts(self, counts_E: Tensor) -> Tensor:
        """(N, L): how many rows each rank sends to each expert of this one."""
        came_E = torch.empty_like(counts_E)
        dist.all_to_all_single(came_E, counts_E, group=self.axis.group)
        return came_E.view(self.axis.size, -1)


def plan_exchange(sent_NL: Tensor, came_NL: Tensor) -> Exchange:
    """Splits on the host (a synchronisation), and the permutation from (rank, expert) order to (expert, rank) order."""
    sent, came = torch.stack([sent_NL.sum(1), came_NL.sum(1)]).tolist()
    rank_major = came_NL.flatten()
    starts = (rank_major.cumsum(0) - rank_major).view_as(came_NL).T.flatten()
    lengths = came_NL.T.flatten()
    ends = lengths.cumsum(0)
    arrived = sum(came)
    shift = torch.repeat_interleave(starts - (ends - lengths), lengths, output_size=arrived)
    order_A = torch.arange(arrived, device=shift.device) + shift
    back_A = torch.empty_like(order_A)
    back_A[order_A] = torch.arange(arrived, device=shift.device)
    return Exchange(sent, came, order_A, back_A)


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
