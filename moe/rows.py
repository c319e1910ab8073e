"""Rows of experts: which token each is a copy of, and the gathers that make them and add them up.

Every direction is a gather, forward and backward: no atomic additions, so the same bits every time.
T tokens, D width, E experts, K choices per token, R rows.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .device import kind_of

AT_ONCE = 2**26
"""Numbers of rows that are weighed at a time: 0.4 GB in bf16 and fp32."""


class Plan(NamedTuple):
    """Where each row goes: row r is a copy of token `token_R[r]`; choice k of token t is row `slot_TK[t, k]`, or -1 (dropped).

    Rows are in the order of the experts, counts_E of each. `filled_R` is False for rows of padding: zeros, whose outputs nobody
    takes; None where there are none. `kept_TK` is False for dropped choices; None where nothing is dropped.
    """

    token_R: Tensor
    slot_TK: Tensor
    counts_E: Tensor
    filled_R: Tensor | None = None
    kept_TK: Tensor | None = None


class Choices(NamedTuple):
    """Tokens that are not yet rows: where their rows come from and go to, and the weight of each choice."""

    plan: Plan
    weights_TK: Tensor


def copy_to_rows(x_TD: Tensor, plan: Plan) -> Tensor:
    """(T, D) to (R, D), differentiable."""
    return _CopyToRows.apply(x_TD, *plan)  # pyright: ignore[reportReturnType]


def weighted_sum(y_RD: Tensor, weights_TK: Tensor, plan: Plan) -> Tensor:
    """(R, D) to (T, D) in the type of y_RD, summed in the type of the weights; differentiable in both."""
    return _WeightedSum.apply(y_RD, weights_TK, *plan)  # pyright: ignore[reportReturnType]


class _CopyToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, *plan: Any) -> Tensor:
        ctx.save_for_backward(*plan)
        return gather_rows(x_TD, Plan(*plan))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return sum_rows(grads[0], Plan(*ctx.saved_tensors)), *5 * [None]


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_TK: Tensor, *plan: Any) -> Tensor:
        ctx.save_for_backward(y_RD, weights_TK, *plan)
        return sum_rows(y_RD, Plan(*plan), weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y_RD, weights_TK, *saved = ctx.saved_tensors
        plan = Plan(*saved)
        grad_RD = gather_rows(grads[0], plan)
        grad_weights_R = dots(y_RD, grad_RD, weights_TK.dtype)
        grad_y_RD = grad_RD.mul_(weights_of_rows(weights_TK, plan)[:, None])
        return grad_y_RD, of_choices(grad_weights_R, plan), *5 * [None]


def gather_rows(x_TD: Tensor, plan: Plan) -> Tensor:
    """(R, D): each row's token, zeros for padding."""
    rows_RD = x_TD.index_select(0, plan.token_R)
    return rows_RD if plan.filled_R is None else rows_RD.masked_fill_(~plan.filled_R.unsqueeze(-1), 0.0)


def sum_rows(y_RD: Tensor, plan: Plan, weights_TK: Tensor | None = None) -> Tensor:
    """(T, D) in the type of y_RD: each token's sum over its rows, times their weights; dropped choices add nothing.

    Summed in fp32 or wider.
    """
    if not len(y_RD):
        return y_RD.new_zeros(len(plan.slot_TK), y_RD.shape[1])
    slot_TK, factors_TK = plan.slot_TK, weights_TK
    if plan.kept_TK is not None:
        slot_TK = slot_TK.clamp(min=0)
        factors_TK = plan.kept_TK if weights_TK is None else weights_TK * plan.kept_TK
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    if weights_TK is None or y_RD.dtype == wide:  # in one pass over the rows; it takes weights of the rows' type only
        factors_TK = None if factors_TK is None else factors_TK.to(y_RD.dtype)
        return F.embedding_bag(slot_TK, y_RD, mode="sum", per_sample_weights=factors_TK)
    assert factors_TK is not None
    add_up = _add_up_choice_by_choice if kind_of(y_RD) == "cpu" else _add_up_at_once
    return add_up(y_RD, slot_TK, factors_TK.to(wide))


def _add_up_choice_by_choice(y_RD: Tensor, slot_TK: Tensor, factors_TK: Tensor) -> Tensor:
    """In the type of the factors, with little memory; three operators for each choice."""
    total_TD = torch.zeros(len(slot_TK), y_RD.shape[1], dtype=factors_TK.dtype, device=y_RD.device)
    for slot_T, factor_T in zip(slot_TK.unbind(1), factors_TK.unbind(1), strict=True):
        total_TD.addcmul_(y_RD.index_select(0, slot_T).to(factors_TK.dtype), factor_T[:, None])
    return total_TD.to(y_RD.dtype)


def _add_up_at_once(y_RD: Tensor, slot_TK: Tensor, factors_TK: Tensor) -> Tensor:
    """In the type of the factors, in four operators whatever K is, for as many tokens as have `AT_ONCE` numbers."""
    total_TD = y_RD.new_empty(len(slot_TK), y_RD.shape[1])
    tokens = max(1, AT_ONCE // (slot_TK.shape[1] * y_RD.shape[1]))
    for total_tD, slot_tK, factors_tK in zip(*(x.split(tokens) for x in (total_TD, slot_TK, factors_TK)), strict=True):
        rows_tKD = y_RD.index_select(0, slot_tK.flatten()).view(*slot_tK.shape, -1)
        total_tD.copy_((rows_tKD * factors_tK.unsqueeze(-1)).sum(1))
    return total_TD


def dots(a_RD: Tensor, b_RD: Tensor, wide: torch.dtype) -> Tensor:
    """(R,): each row's product with the other's, in the type `wide`; a product of two bf16 numbers is exact in fp32."""
    if a_RD.dtype == wide:
        return (a_RD * b_RD).sum(-1)
    if kind_of(a_RD) == "cpu":
        return a_RD.to(wide).mul_(b_RD).sum(-1)
    return torch.addcmul(a_RD.new_zeros(1, 1, dtype=wide), a_RD, b_RD).sum(-1)  # without a wide copy of either


def weights_of_rows(weights_TK: Tensor, plan: Plan) -> Tensor:
    """(R,): the weight of each row's choice, 0 for padding."""
    if plan.kept_TK is None and plan.filled_R is None:
        return torch.empty_like(weights_TK).flatten().index_copy_(0, plan.slot_TK.flatten(), weights_TK.flatten())
    weights_R = weights_TK.new_zeros(len(plan.token_R) + 1)
    weights_R[plan.slot_TK.flatten()] = weights_TK.flatten()  # dropped choices (-1) land in the extra last place
    return weights_R[:-1]


def of_choices(values_R: Tensor, plan: Plan) -> Tensor:
    """(T, K): each choice's row of (R,), 0 for dropped ones."""
    if not len(values_R):
        return values_R.new_zeros(plan.slot_TK.shape)
    if plan.kept_TK is None:
        return values_R[plan.slot_TK]
    return values_R[plan.slot_TK.clamp(min=0)] * plan.kept_TK
