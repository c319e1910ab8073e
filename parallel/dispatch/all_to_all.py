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
from ...moe.dispatch import DispatchedTokens, RowPlan, chosen, count_rows, permute, plan_choices, unpermute
from ...moe.router import Routing
from ..mesh import Axis
from ..progress import collective, waiting, waiting_for_device
from .async_collectives import Flight, RowExchange, depart, land
from .base import ExchangingDispatcher


class Splits(NamedTuple):
    """How many rows go to and come from each rank."""

    sent_N: list[int]
    came_N: list[int]


class ArrivalOrder(NamedTuple):
    """Arrived rows in the order of their experts are `rows[order_A]`; `back_A` is the inverse permutation."""

    order_A: Tensor
    back_A: Tensor


class Sent(NamedTuple):
    """What stays here while rows travel, there or back."""

    flight: Flight
    plan: RowPlan
    weights_TK: Tensor
    came_NL: Tensor
    splits: Splits


class WayBack(NamedTuple):
    sent: Sent
    order: ArrivalOrder


class PlainDispatcher(ExchangingDispatcher):
    """Rows to the ranks of their experts: sorted by expert, they are sorted by rank too.

    What the host can plan without the other ranks is planned while the counts travel, the rest while the rows do.
    """

    def __init__(self, experts: int, axis: Axis, chunks: int = 1) -> None:
        super().__init__(chunks)
        self.experts = experts
        self.axis = axis

    def send(self, x_TD: Tensor, routing: Routing) -> Sent:
        chosen_TK = chosen(routing, self.experts)
        counts_E = count_rows(chosen_TK, self.experts)
        leaving_E = counts_E if routing.padded_rows is None else torch.full_like(counts_E, routing.padded_rows)
        came_E = torch.empty_like(leaving_E)
        with collective("all_to_all", self.axis):
            counts = dist.all_to_all_single(came_E, leaving_E, group=self.axis.group, async_op=True)
        plan = plan_choices(chosen_TK, self.experts, routing.padded_rows, routing.kept_TK is not None, counts_E)
        rows_RD = permute(x_TD, plan)
        assert counts is not None
        with waiting(f"all_to_all of counts over {self.axis.size} ranks"):
            counts.wait()
        leaving_NL, came_NL = leaving_E.view(self.axis.size, -1), came_E.view(self.axis.size, -1)
        splits = read_splits(leaving_NL, came_NL, len(rows_RD))
        flight = depart(rows_RD, RowExchange(*splits, self.axis))
        return Sent(flight, plan, routing.weights_TK, came_NL, splits)

    def receive(self, sent: Sent) -> DispatchedTokens:
        order, counts_L = plan_arrivals(sent.came_NL, sum(sent.splits.came_N)), sent.came_NL.sum(0)
        return DispatchedTokens(reorder(land(sent.flight), *order), counts_L, WayBack(sent, order))

    def send_back(self, y_RD: Tensor, arrived: DispatchedTokens) -> Sent:
        sent, order = arrived.metadata
        rows_AD = reorder(y_RD, order.back_A, order.order_A)
        return sent._replace(flight=depart(rows_AD, RowExchange(sent.splits.came_N, sent.splits.sent_N, self.axis)))

    def receive_back(self, sent: Sent) -> Tensor:
        return unpermute(land(sent.flight), sent.weights_TK, sent.plan)


def read_splits(sent_NL: Tensor, came_NL: Tensor, rows: int) -> Splits:
    """Splits on the host (a synchronisation).

    A dry run assumes that `rows` leave this rank, the same number to each, and as many come.
    """
    sums = torch.stack([sent_NL, came_NL]).sum(-1)
    with waiting_for_device():
        return Splits(*host_read(sums, "rows of each rank", lambda: [even(rows, len(sent_NL))] * 2))


def plan_arrivals(came_NL: Tensor, rows: int) -> ArrivalOrder:
    """The permutation from (rank, expert) order to (expert, rank) order of `rows` rows."""
    came_LN = came_NL.T.contiguous()
    ends_by_rank_NL = came_NL.flatten().cumsum(0).view_as(came_NL)
    ends_by_expert_LN = came_LN.flatten().cumsum(0).view_as(came_LN)
    shift_LN = ends_by_expert_LN - ends_by_rank_NL.T
    place_A = torch.arange(rows, device=came_NL.device)
    order_A = place_A - torch.repeat_interleave(shift_LN.flatten(), came_LN.flatten(), output_size=rows)
    return ArrivalOrder(order_A, torch.empty_like(order_A).index_copy_(0, order_A, place_A))


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
