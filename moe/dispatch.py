"""Token rows to their experts and back, on one device: one stable sort gives the permutation and its inverse.

T tokens, D width, E experts, K choices per token, A = T * K choices, R rows that arrive (choices that are kept).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .router import Routing


class Plan(NamedTuple):
    """Where each row goes: row r is a copy of token `token_R[r]`; choice k of token t is row `slot_TK[t, k]`, or -1 (dropped).

    `filled_R` is False for rows of padding: zeros, whose outputs nobody takes; None where there are none.
    """

    token_R: Tensor
    slot_TK: Tensor
    counts_E: Tensor
    filled_R: Tensor | None = None


class Arrived(NamedTuple):
    """The rows for this device's experts, in the order of the experts, and what `combine` needs to take them back."""

    tokens_RD: Tensor
    counts_E: Tensor
    way_back: Any


Compute = Callable[[Tensor, Tensor], Tensor]
"""The experts: rows (R, D) in the order of the experts and counts_E to (R, D)."""
Beside = Callable[[], Any]
"""Something that needs nothing of the experts."""


class Dispatcher(ABC):
    """Brings token rows to the experts and their outputs back. Holds no parameters and no state between the two calls."""

    @abstractmethod
    def dispatch(self, x_TD: Tensor, routing: Routing) -> Arrived:
        """Copy each token of (T, D) to a row for each of its kept experts."""

    @abstractmethod
    def combine(self, y_RD: Tensor, arrived: Arrived) -> Tensor:
        """Each token's weighted sum of its experts' rows: (R, D) to (T, D)."""

    def run(self, x_TD: Tensor, routing: Routing, experts: Compute, beside: Beside) -> tuple[Tensor, Any]:
        """Dispatch, experts, combine: (T, D) to (T, D). And what `beside` gives, which is computed while rows travel."""
        arrived = self.dispatch(x_TD, routing)
        y_RD = experts(arrived.tokens_RD, arrived.counts_E)
        return self.combine(y_RD, arrived), beside()


class LocalDispatcher(Dispatcher):
    """All experts are on this device."""

    def __init__(self, experts: int) -> None:
        self.experts = experts

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Arrived:
        plan = plan_rows(routing, self.experts)
        return Arrived(copy_to_rows(x_TD, plan), plan.counts_E, (plan, routing.weights_TK))

    def combine(self, y_RD: Tensor, arrived: Arrived) -> Tensor:
        plan, weights_TK = arrived.way_back
        return weighted_sum(y_RD, weights_TK, plan)


def plan_rows(routing: Routing, experts: int) -> Plan:
    """Rows in the order of (expert, token). With dropping, the number of rows is read on the host (a synchronisation)."""
    return plan_choices(chosen(routing, experts), experts, routing.padded_rows, dropping=routing.kept_TK is not None)


def chosen(routing: Routing, experts: int) -> Tensor:
    """(T, K): the experts, and `experts` for what was dropped."""
    return routing.experts_TK if routing.kept_TK is None else routing.experts_TK.masked_fill(~routing.kept_TK, experts)


def plan_choices(experts_TK: Tensor, experts: int, padded_rows: int | None, dropping: bool) -> Plan:
    """See `plan_rows`. With padding each expert has the same number of rows, zeros behind its tokens, and nothing is read."""
    top_k = experts_TK.shape[1]
    chosen_A = experts_TK.flatten()
    order_A = chosen_A.argsort(stable=True)
    counts_E = torch.zeros(experts + 1, dtype=torch.int64, device=chosen_A.device)
    counts_E = counts_E.scatter_add_(0, chosen_A, torch.ones_like(chosen_A))[:experts]
    slot_A = torch.empty_like(order_A)
    slot_A[order_A] = torch.arange(len(order_A), device=order_A.device)
    if padded_rows is not None:
        return _padded(Plan(order_A // top_k, slot_A.view_as(experts_TK), counts_E), chosen_A, padded_rows)
    rows = int(counts_E.sum()) if dropping else len(order_A)
    slot_A = slot_A.masked_fill(slot_A >= rows, -1)
    return Plan(order_A[:rows] // top_k, slot_A.view_as(experts_TK), counts_E)


def _padded(plan: Plan, chosen_A: Tensor, rows: int) -> Plan:
    """`plan` still has all A choices, the dropped ones last."""
    experts, total = len(plan.counts_E), len(plan.counts_E) * rows
    shift_E = torch.arange(experts, device=chosen_A.device) * rows - (plan.counts_E.cumsum(0) - plan.counts_E)
    slot_A = plan.slot_TK.flatten() + torch.cat([shift_E, shift_E.new_zeros(1)])[chosen_A]
    slot_A = slot_A.masked_fill(chosen_A == experts, -1)
    choice_R = torch.full((total + 1,), -1, device=chosen_A.device)
    choice_R[slot_A] = torch.arange(len(slot_A), device=chosen_A.device)  # dropped choices land in the extra last place
    choice_R, slot_TK = choice_R[:-1], slot_A.view_as(plan.slot_TK)
    token_R = choice_R.clamp(min=0) // slot_TK.shape[1]
    return Plan(token_R, slot_TK, torch.full_like(plan.counts_E, rows), choice_R >= 0)


def copy_to_rows(x_TD: Tensor, plan: Plan) -> Tensor:
    """(T, D) to (R, D), differentiable."""
    return _CopyToRows.apply(x_TD, plan.token_R, plan.slot_TK, plan.filled_R)  # pyright: ignore[reportReturnType]


def weighted_sum(y_RD: Tensor, weights_TK: Tensor, plan: Plan) -> Tensor:
    """(R, D) to (T, D) in the type of y_RD, summed in the type of the weights; differentiable in both."""
    return _WeightedSum.apply(y_RD, weights_TK, plan.token_R, plan.slot_TK)  # pyright: ignore[reportReturnType]


class _CopyToRows(torch.autograd.Function):
    """Gather forward and gather-and-add backward: no atomic additions, so the same bits every time."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, slot_TK: Tensor, filled_R: Tensor | None) -> Tensor:
        ctx.save_for_backward(slot_TK)
        rows_RD = x_TD.index_select(0, token_R)
        return rows_RD if filled_R is None else rows_RD.masked_fill_(~filled_R.unsqueeze(-1), 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (slot_TK,) = ctx.saved_tensors
        return sum_rows(grads[0], slot_TK), None, None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_TK: Tensor, token_R: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, weights_TK, token_R, slot_TK)
        return sum_rows(y_RD, slot_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y_RD, weights_TK, token_R, slot_TK = ctx.saved_tensors
        grad_TD = grads[0]
        flat_TK = slot_TK.flatten()
        weights_R = weights_TK.new_zeros(len(token_R) + 1)
        weights_R[flat_TK] = weights_TK.flatten()  # dropped choices (-1) land in the extra last place
        grad_y_RD = (grad_TD.index_select(0, token_R) * weights_R[:-1, None]).to(y_RD.dtype)
        grad_weights_TK = torch.empty_like(weights_TK)
        for k in range(slot_TK.shape[1]):
            rows_TD, kept_T1 = _rows_of_choice(y_RD, slot_TK, k)
            # Widened before the product: the router's gradient is not rounded to bf16.
            grad_weights_TK[:, k] = (rows_TD.to(weights_TK.dtype) * grad_TD * kept_T1).sum(dim=-1)
        return grad_y_RD, grad_weights_TK, None, None


def sum_rows(y_RD: Tensor, slot_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """(T, D): for each token the sum of its rows of (R, D), each times its weight; dropped choices add nothing."""
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    total_TD = torch.zeros(len(slot_TK), y_RD.shape[1], dtype=wide, device=y_RD.device)
    for k in range(slot_TK.shape[1]):
        rows_TD, kept_T1 = _rows_of_choice(y_RD, slot_TK, k)
        factor_T1 = kept_T1.to(wide) if weights_TK is None else weights_TK[:, k, None] * kept_T1
        total_TD.addcmul_(rows_TD.to(wide), factor_T1.to(wide))
    return total_TD.to(y_RD.dtype)


def _rows_of_choice(y_RD: Tensor, slot_TK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The rows (T, D) of everybody's choice k, and (T, 1) whether it was kept (the row of a dropped one is any row)."""
    slot_T = slot_TK[:, k]
    if not len(y_RD):
        return y_RD.new_zeros(len(slot_T), y_RD.shape[1]), (slot_T >= 0)[:, None]
    return y_RD.index_select(0, slot_T.clamp(min=0)), (slot_T >= 0)[:, None]
