"""Rows of experts: which token each is a copy of, and the gathers that make them and add them up.

Every direction is a gather, forward and backward: no atomic additions, so the same bits every time.
T tokens, D width, E experts, K choices per token, R rows.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Plan(NamedTuple):
    """Where each row goes: row r is a copy of token `token_R[r]`; choice k of token t is row `slot_TK[t, k]`, or -1 (dropped).

    Rows are in the order of the experts, counts_E of each. `filled_R` is False for rows of padding: zeros, whose outputs nobody
    takes; None where there are none.
    """

    token_R: Tensor
    slot_TK: Tensor
    counts_E: Tensor
    filled_R: Tensor | None = None


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
        ctx.save_for_backward(Plan(*plan).slot_TK)
        return gather_rows(x_TD, Plan(*plan))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (slot_TK,) = ctx.saved_tensors
        return sum_rows(grads[0], slot_TK), *4 * [None]


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_TK: Tensor, *plan: Any) -> Tensor:
        ctx.save_for_backward(y_RD, weights_TK, *plan)
        return sum_rows(y_RD, Plan(*plan).slot_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y_RD, weights_TK, *saved = ctx.saved_tensors
        plan, wide = Plan(*saved), weights_TK.dtype
        grad_RD = gather_rows(grads[0], plan)
        # Widened before the product: the router's gradient is not rounded to bf16.
        grad_weights_R = (y_RD.to(wide) * grad_RD).sum(dim=-1)
        grad_y_RD = (grad_RD * weights_of_rows(weights_TK, plan)[:, None]).to(y_RD.dtype)
        return grad_y_RD, of_choices(grad_weights_R, plan.slot_TK), *4 * [None]


def gather_rows(x_TD: Tensor, plan: Plan) -> Tensor:
    """(R, D): each row's token, zeros for padding."""
    rows_RD = x_TD.index_select(0, plan.token_R)
    return rows_RD if plan.filled_R is None else rows_RD.masked_fill_(~plan.filled_R.unsqueeze(-1), 0.0)


def sum_rows(y_RD: Tensor, slot_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """(T, D) in the type of y_RD: each token's sum over its rows, times their weights; dropped choices add nothing.

    Summed in fp32 or wider.
    """
    if not len(y_RD):
        return y_RD.new_zeros(len(slot_TK), y_RD.shape[1])
    slot_TK, kept_TK = slot_TK.clamp(min=0), slot_TK >= 0
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    if weights_TK is None or y_RD.dtype == wide:  # in one pass over the rows; it takes weights of the rows' type only
        factors_TK = kept_TK.to(y_RD.dtype) if weights_TK is None else (weights_TK * kept_TK).to(wide)
        return F.embedding_bag(slot_TK, y_RD, mode="sum", per_sample_weights=factors_TK)
    factors_TK = (weights_TK * kept_TK).to(wide)
    total_TD = torch.zeros(len(slot_TK), y_RD.shape[1], dtype=wide, device=y_RD.device)
    for slot_T, factor_T in zip(slot_TK.unbind(1), factors_TK.unbind(1), strict=True):
        total_TD.addcmul_(y_RD.index_select(0, slot_T).to(wide), factor_T[:, None])
    return total_TD.to(y_RD.dtype)


def weights_of_rows(weights_TK: Tensor, plan: Plan) -> Tensor:
    """(R,): the weight of each row's choice, 0 for padding."""
    weights_R = weights_TK.new_zeros(len(plan.token_R) + 1)
    weights_R[plan.slot_TK.flatten()] = weights_TK.flatten()  # dropped choices (-1) land in the extra last place
    return weights_R[:-1]


def of_choices(values_R: Tensor, slot_TK: Tensor) -> Tensor:
    """(T, K): each choice's row of (R,), 0 for dropped ones."""
    if not len(values_R):
        return values_R.new_zeros(slot_TK.shape)
    return values_R[slot_TK.clamp(min=0)] * (slot_TK >= 0)
