"""Gather, two grouped products, weighted sum: the experts' function and its backward pass, which keeps as little as a dense layer.

Kept are the input and the first product: the rows are gathered and the activation is made again, and no output is needed. A row's
output is a product of its activation a, y = W a; so the gradient of the row's weight, <dy, y>, is also <W.T dy, a>, and W.T dy is
computed anyhow (SonicMoE, Guo et al. 2025). All is computed in the type of the products, `arithmetic(x)`; what goes in, comes out
and is kept is in that of x.
T tokens, K choices of each, R rows in the order of the experts, E experts, D width, F hidden width, N = P * F with P projections.
"""

from typing import Any

import torch
from torch import Tensor

from .activations import activate, activate_and_pull, projections
from .config import Activation
from .device import kind_of
from .grouped import grouped_mm, grouped_outer
from .products import arithmetic
from .rows import Plan, dots, gather_rows, of_choices, sum_rows, weights_of_rows

BLOCK = 2**18
"""Numbers: what is done element by element between the products is done on so many at a time."""


class ExpertFunction(torch.autograd.Function):
    """See `Experts.forward`. The plan and the weights are there if x are tokens, and not if x are rows."""

    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        x: Tensor,
        gate_up_END: Tensor,
        down_EDF: Tensor,
        gate_up_bias_EN: Tensor | None,
        down_bias_ED: Tensor | None,
        weights_TK: Tensor | None,
        counts_E: Tensor,
        *places: Any,
    ) -> Tensor:
        plan, ends_E, wide = Plan(*places) if places else None, ends(counts_E), arithmetic(x)
        inner_RN = _biased(grouped_mm(_rows(x, plan), gate_up_END.to(wide), ends_E), gate_up_bias_EN, counts_E)
        y_RD = _biased(grouped_mm(_activated(activation, inner_RN), down_EDF.to(wide), ends_E), down_bias_ED, counts_E)
        inner_RN = inner_RN.to(x.dtype)
        ctx.activation = activation
        biases = gate_up_bias_EN, down_bias_ED
        ctx.save_for_backward(x, inner_RN, gate_up_END, down_EDF, *biases, weights_TK, counts_E, ends_E, *places)
        return (sum_rows(y_RD, plan, weights_TK) if plan else y_RD).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, inner_RN, gate_up_END, down_EDF, gate_up_bias_EN, down_bias_ED, weights_TK, counts_E, ends_E, *places = ctx.saved_tensors
        plan, wide = Plan(*places) if places else None, arithmetic(x)
        grad_y_RD = _rows(grads[0], plan)
        grad_active_RF = grouped_mm(grad_y_RD, down_EDF.to(wide).transpose(1, 2), ends_E)
        weights_R1 = weights_of_rows(weights_TK, plan)[:, None] if plan else None
        active_RF, grad_inner_RN, grad_weights_R = _back_through_activation(ctx.activation, inner_RN, grad_active_RF, weights_R1)
        del grad_active_RF
        grad_weights_TK = grad_down_bias = grad_gate_up_bias = None
        if down_bias_ED is not None and weights_R1 is not None:
            grad_weights_R += _dots(grad_y_RD, _of_rows(down_bias_ED, counts_E, len(grad_y_RD)), weights_R1.dtype)
        if plan:
            grad_weights_TK = of_choices(grad_weights_R, plan)
        if down_bias_ED is not None:
            grad_down_bias = _sums(grad_y_RD if weights_R1 is None else grad_y_RD * weights_R1, counts_E)
        grad_down_EDF = grouped_outer(grad_y_RD, active_RF, ends_E).to(x.dtype)
        del grad_y_RD, active_RF
        if gate_up_bias_EN is not None:
            grad_gate_up_bias = _sums(grad_inner_RN, counts_E)
        grad_gate_up_END = grouped_outer(grad_inner_RN, _rows(x, plan), ends_E).to(x.dtype)
        grad_rows_RD = grouped_mm(grad_inner_RN, gate_up_END.to(wide).transpose(1, 2), ends_E)
        grad_x = (sum_rows(grad_rows_RD, plan) if plan else grad_rows_RD).to(x.dtype)
        gradients = grad_x, grad_gate_up_END, grad_down_EDF, grad_gate_up_bias, grad_down_bias, grad_weights_TK
        return None, *gradients, None, *[None] * len(places)


def _rows(x: Tensor, plan: Plan | None) -> Tensor:
    """(R, D): what products take, of tokens (T, D) with a plan, else of rows."""
    x = x.to(arithmetic(x))
    return gather_rows(x, plan) if plan else x.contiguous()


def _activated(activation: Activation, inner_RN: Tensor) -> Tensor:
    """(R, F)."""
    active_RF = inner_RN.new_empty(len(inner_RN), inner_RN.shape[1] // projections(activation))
    for block in _blocks(inner_RN):
        activate(activation, inner_RN[block], out=active_RF[block])
    return active_RF


def _back_through_activation(
    activation: Activation, inner_RN: Tensor, grad_RF: Tensor, weights_R1: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The activation times its row's weight, which may overwrite its gradient `grad_RF`; inner's gradient; the weights' (R,).

    `grad_RF` is that of a row with weight 1. Without weights there is no gradient of them.
    """
    grad_inner_RN = torch.empty_like(inner_RN, dtype=grad_RF.dtype)
    grad_weights_R = inner_RN.new_empty(0) if weights_R1 is None else weights_R1.new_empty(len(inner_RN))
    for block in _blocks(inner_RN):
        (active, pull), grad = activate_and_pull(activation, inner_RN[block].to(grad_RF.dtype)), grad_RF[block]
        weights = 1.0 if weights_R1 is None else weights_R1[block]
        if weights_R1 is not None:
            grad_weights_R[block] = _dots(active, grad, weights_R1.dtype)
            grad.mul_(weights)
        pull(grad, grad_inner_RN[block])
        if weights_R1 is None and len(active) == len(grad_RF):  # all rows at once: nothing to put together
            return active, grad_inner_RN, grad_weights_R
        torch.mul(active, weights, out=grad)
    return grad_RF, grad_inner_RN, grad_weights_R


def _blocks(x_RN: Tensor) -> list[slice]:
    """Rows that one after the other stay in a core's cache, on a CPU; on a GPU all at once."""
    rows = max(1, BLOCK // x_RN.shape[1]) if kind_of(x_RN) == "cpu" else max(1, len(x_RN))
    return [slice(start, start + rows) for start in range(0, len(x_RN), rows)]


def _dots(a_RN: Tensor, b_RN: Tensor, wide: torch.dtype) -> Tensor:
    """(R,): each row's product with the other's. A CPU rounds what it multiplies in bf16 to that."""
    return (a_RN * b_RN).sum(-1, dtype=wide) if kind_of(a_RN) == "cpu" else dots(a_RN, b_RN, wide)


def ends(counts_E: Tensor) -> Tensor:
    """(E,), int32: the row behind each expert's last."""
    return counts_E.cumsum(0, dtype=torch.int32)


def _biased(x_RN: Tensor, bias_EN: Tensor | None, counts_E: Tensor) -> Tensor:
    """Each row plus the bias of its expert; writes into x_RN."""
    return x_RN if bias_EN is None else x_RN.add_(_of_rows(bias_EN, counts_E, len(x_RN)))


def _of_rows(values_EN: Tensor, counts_E: Tensor, rows: int) -> Tensor:
    return values_EN.repeat_interleave(counts_E, dim=0, output_size=rows)


def _sums(x_RN: Tensor, counts_E: Tensor) -> Tensor:
    """(E, N): the sum over each expert's rows. To check the lengths first, the host would wait for the device."""
    wide_RN = x_RN.float() if x_RN.dtype == torch.bfloat16 else x_RN
    return torch.segment_reduce(wide_RN, "sum", lengths=counts_E, axis=0, unsafe=True)
