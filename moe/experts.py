"""The experts of one layer as two grouped products, with gate and up in one tensor.

E experts on this device, R rows in the order of the experts, T tokens, K choices of each, D width, F hidden width of an expert, P
projections (gate and up, or up alone).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .config import Activation, Products
from .deferred import defer, defers
from .device import kind_of, uses_kernels
from .dispatch import Choices, RowPlan, gather_rows, row_dots, sum_rows, values_per_choice, weights_per_row
from .dropout import Dropout
from .feedforward import activate, activate_with_backward
from .fp8 import product
from .grouped_products import grouped_outer
from .kernels import operators
from .linear import compute_dtype
from .recompute import keep, repeats
from .token_info import Purpose, fold_in
from .weight_cast import weight_as

# The experts' autograd function: gather, two grouped products, weighted sum. It saves as little as a dense layer.
#
# It saves the input and the first product; the backward pass gathers the rows and computes the activation again, and needs no
# output. The output of a row is y = W a for its activation a, so the gradient of the row's weight, <dy, y>, equals <W.T dy, a>, and
# W.T dy is computed anyway (SonicMoE, Guo et al. 2025). Everything is computed in `compute_dtype(x)`; inputs, outputs and saved
# tensors have the dtype of x. T tokens, K choices of each, R rows in the order of the experts, E experts, D width, F hidden width,
# N = P * F with P projections.

BLOCK = 2**18
"""Elements that are processed at a time between the products."""


class ExpertFunction(torch.autograd.Function):
    """See `Experts.forward`. `weights_TK` and the other tensors of a `RowPlan` are given if x are tokens, and not if x are rows.

    With keys_R, int64, activations are dropped by these keys of the rows; the backward pass computes the mask again. `deferred`:
    down and gate_up, if those among the tensors are constants and their gradients are left for later (moe/deferred.py). `products`
    in FP8, which x must be rows for, leave the gradients of weights as they are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        dropout: Dropout,
        deferred: tuple[Tensor, Tensor] | None,
        output_is_sent: bool,
        products: Products,
        x: Tensor,
        gate_up_END: Tensor,
        down_EDF: Tensor,
        gate_up_bias_EN: Tensor | None,
        down_bias_ED: Tensor | None,
        weights_TK: Tensor | None,
        counts_E: Tensor,
        keys_R: Tensor | None,
        *plan_tensors: Any,
    ) -> Tensor:
        plan, wide = _plan(plan_tensors, counts_E), compute_dtype(x)
        assert plan is None or products is Products.wide, "the gradient of a weight by <W.T dy, a>"
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        outputs: list[Tensor] = []

        def inner() -> Tensor:
            inner_RN = _biased(product(products, _rows(x, plan), gate_up_END.to(wide), ends_E), gate_up_bias_EN, counts_E)
            active_RF = _activated(activation, inner_RN)
            if keys_R is not None:
                _drop(active_RF, dropout, dropout.keep(keys_R, active_RF.shape[1]))
            y_RD = _biased(product(products, active_RF, down_EDF.to(wide), ends_E), down_bias_ED, counts_E)
            outputs.append((sum_rows(y_RD, plan, weights_TK) if plan else y_RD).to(x.dtype))
            return inner_RN.to(x.dtype)

        inner_RN = keep(inner)
        if output_is_sent and repeats():
            outputs.append(x.new_empty(len(x), down_EDF.shape[1]))  # nobody reads it: what comes back is kept
        y = outputs[0] if output_is_sent else keep(outputs.pop)
        ctx.activation, ctx.dropout, ctx.deferred, ctx.products = activation, dropout, deferred, products
        biases = gate_up_bias_EN, down_bias_ED
        ctx.save_for_backward(x, inner_RN, gate_up_END, down_EDF, *biases, weights_TK, counts_E, ends_E, keys_R, *plan_tensors)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, inner_RN, gate_up_END, down_EDF, gate_up_bias_EN, down_bias_ED, *rest = ctx.saved_tensors
        weights_TK, counts_E, ends_E, keys_R, *plan_tensors = rest
        plan, wide = _plan(plan_tensors, counts_E), compute_dtype(x)
        grad_y_RD = _rows(grads[0], plan)
        grad_active_RF = product(ctx.products, grad_y_RD, down_EDF.to(wide).transpose(1, 2), ends_E)
        weights_R1 = weights_per_row(weights_TK, plan)[:, None] if plan else None
        keep_RF = None if keys_R is None else ctx.dropout.keep(keys_R, grad_active_RF.shape[1])
        if keep_RF is not None:
            _drop(grad_active_RF, ctx.dropout, keep_RF)
        active_RF, grad_inner_RN, grad_weights_R = _activation_backward(ctx.activation, inner_RN, grad_active_RF, weights_R1)
        del grad_active_RF
        if keep_RF is not None:
            _drop(active_RF, ctx.dropout, keep_RF)
        grad_weights_TK = grad_down_bias = grad_gate_up_bias = None
        if down_bias_ED is not None and weights_R1 is not None:
            grad_weights_R += _dots(grad_y_RD, _of_rows(down_bias_ED, counts_E, len(grad_y_RD)), weights_R1.dtype)
        if plan:
            grad_weights_TK = values_per_choice(grad_weights_R, plan)
        if down_bias_ED is not None:
            grad_down_bias = _sums(grad_y_RD if weights_R1 is None else grad_y_RD * weights_R1, counts_E)
        outer = [partial(grouped_outer, grad_y_RD, active_RF, ends_E)]
        grad_down_EDF = None if ctx.deferred else outer.pop()().to(x.dtype)
        del grad_y_RD, active_RF
        if gate_up_bias_EN is not None:
            grad_gate_up_bias = _sums(grad_inner_RN, counts_E)
        outer.append(partial(_outer_of_rows, grad_inner_RN, x.detach(), plan, ends_E))
        grad_gate_up_END = None if ctx.deferred else outer.pop()().to(x.dtype)
        for weight, gradient in zip(ctx.deferred or (), outer, strict=True):
            defer(weight, gradient)
        grad_rows_RD = product(ctx.products, grad_inner_RN, gate_up_END.to(wide).transpose(1, 2), ends_E)
        grad_x = (sum_rows(grad_rows_RD, plan) if plan else grad_rows_RD).to(x.dtype)
        gradients = grad_x, grad_gate_up_END, grad_down_EDF, grad_gate_up_bias, grad_down_bias, grad_weights_TK
        return None, None, None, None, None, *gradients, None, None, *[None] * len(plan_tensors)


def _plan(tensors: Sequence[Any], counts_E: Tensor) -> RowPlan | None:
    """Returns the plan of these tensors, which counts_E is not among: torch.compile takes each tensor once."""
    if not tensors:
        return None
    token_R, slot_TK, filled_R, kept_TK = tensors
    return RowPlan(token_R, slot_TK, counts_E, filled_R, kept_TK)


def _rows(x: Tensor, plan: RowPlan | None) -> Tensor:
    """(R, D): the rows for the products, gathered from tokens (T, D) if there is a plan."""
    x = x.to(compute_dtype(x))
    return gather_rows(x, plan) if plan else x.contiguous()


def _outer_of_rows(grad_inner_RN: Tensor, x: Tensor, plan: RowPlan | None, ends_E: Tensor) -> Tensor:
    """(E, N, D): the gradient of gate_up."""
    return grouped_outer(grad_inner_RN, _rows(x, plan), ends_E)


def _drop(x_RF: Tensor, dropout: Dropout, keep_RF: Tensor) -> None:
    """Drops elements in place."""
    x_RF.masked_fill_(~keep_RF, 0.0).mul_(dropout.scale)


def _activated(activation: Activation, inner_RN: Tensor) -> Tensor:
    """(R, F)."""
    if uses_kernels(inner_RN) or torch.compiler.is_compiling():
        return activate(activation, inner_RN)
    active_RF = inner_RN.new_empty(len(inner_RN), inner_RN.shape[1] // activation.projections)
    for block in _blocks(inner_RN):
        activate(activation, inner_RN[block], out=active_RF[block])
    return active_RF


def _activation_backward(
    activation: Activation, inner_RN: Tensor, grad_RF: Tensor, weights_R1: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the activation times its row's weight, the gradient of `inner_RN`, and that of the weights (R,), if there are any.

    `grad_RF` is the gradient of the activation of a row with weight 1; it may be overwritten.
    """
    if uses_kernels(inner_RN):
        weights_R = None if weights_R1 is None else weights_R1[:, 0]
        grad_inner_RN, grad_weights_R = operators.weighted_activation_backward(inner_RN, grad_RF, weights_R, activation.value)
        return grad_RF, grad_inner_RN, grad_weights_R if weights_R is None else grad_weights_R.to(weights_R.dtype)
    if torch.compiler.is_compiling():  # fused, so without blocks
        active_RF, backward = activate_with_backward(activation, inner_RN.to(grad_RF.dtype))
        if weights_R1 is None:
            return active_RF, backward(grad_RF, None), inner_RN.new_empty(0)
        grad_weights_R, dtype = _dots(active_RF, grad_RF, weights_R1.dtype), grad_RF.dtype
        return (active_RF * weights_R1).to(dtype), backward((grad_RF * weights_R1).to(dtype), None), grad_weights_R
    grad_inner_RN = torch.empty_like(inner_RN, dtype=grad_RF.dtype)
    grad_weights_R = inner_RN.new_empty(0) if weights_R1 is None else weights_R1.new_empty(len(inner_RN))
    for block in _blocks(inner_RN):
        (active, backward), grad = activate_with_backward(activation, inner_RN[block].to(grad_RF.dtype)), grad_RF[block]
        weights = 1.0 if weights_R1 is None else weights_R1[block]
        if weights_R1 is not None:
            grad_weights_R[block] = _dots(active, grad, weights_R1.dtype)
            grad.mul_(weights)
        backward(grad, grad_inner_RN[block])
        if weights_R1 is None and len(active) == len(grad_RF):  # a single block
            return active, grad_inner_RN, grad_weights_R
        torch.mul(active, weights, out=grad)
    return grad_RF, grad_inner_RN, grad_weights_R


def _blocks(x_RN: Tensor) -> list[slice]:
    """Splits rows into blocks that fit into a core's cache; on a GPU there is one block."""
    rows = max(1, BLOCK // x_RN.shape[1]) if kind_of(x_RN) == "cpu" else max(1, len(x_RN))
    return [slice(start, start + rows) for start in range(0, len(x_RN), rows)]


def _dots(a_RN: Tensor, b_RN: Tensor, wide: torch.dtype) -> Tensor:
    """(R,): the dot product of each row of `a` with that of `b`. On a CPU products of bf16 are rounded to bf16."""
    return (a_RN * b_RN).sum(-1, dtype=wide) if kind_of(a_RN) == "cpu" else row_dots(a_RN, b_RN, wide)


def _biased(x_RN: Tensor, bias_EN: Tensor | None, counts_E: Tensor) -> Tensor:
    """Adds the bias of its expert to each row, in place."""
    return x_RN if bias_EN is None else x_RN.add_(_of_rows(bias_EN, counts_E, len(x_RN)))


def _of_rows(values_EN: Tensor, counts_E: Tensor, rows: int) -> Tensor:
    """Returns the value of each row's expert; of rows behind those of all experts the last one's, so that every index exists."""
    index_R = torch.arange(rows, device=counts_E.device)
    expert_R = torch.searchsorted(counts_E.cumsum(0), index_R, right=True).clamp_(max=len(counts_E) - 1)
    return values_EN.index_select(0, expert_R)


def _sums(x_RN: Tensor, counts_E: Tensor) -> Tensor:
    """(E, N): the sum over the rows of each expert. `unsafe` skips a check of the lengths, for which the host would wait."""
    wide_RN = x_RN.float() if x_RN.dtype == torch.bfloat16 else x_RN
    return torch.segment_reduce(wide_RN, "sum", lengths=counts_E, axis=0, unsafe=True)


class Experts(nn.Module):
    """down_e(f(gate_e(x), up_e(x))) for the rows x of each expert e; no loop over experts.

    Weights: gate_up (E, P, F, D) and down (E, D, F), with `bias` also gate_up_bias (E, P, F) and down_bias (E, D). Dimension 0 is
    the expert's global id, whatever rank holds it.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        dtype: torch.dtype,
        activation: Activation = Activation.swiglu,
        bias: bool = False,
        dropout: float = 0.0,
        products: Products = Products.wide,
    ) -> None:
        super().__init__()
        parts = activation.projections
        self.activation, self.products = activation, products
        self.dropout = Dropout(dropout, Purpose.hidden_dropout)
        self.first_expert = 0
        """The global id of this device's first expert."""
        self.gate_up = nn.Parameter(torch.empty(experts, parts, hidden, width, dtype=dtype))
        self.down = nn.Parameter(torch.empty(experts, width, hidden, dtype=dtype))
        self.gate_up_bias = nn.Parameter(torch.empty(experts, parts, hidden, dtype=dtype)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(experts, width, dtype=dtype)) if bias else None
        self.adds_bias = bias
        """Whether to add down_bias: False if the output is one part of a sum and another part adds it."""
        self.output_is_sent = False
        """Whether the output is only sent to other ranks: then the backward pass does not need its values."""

    def extra_repr(self) -> str:
        experts, width, hidden = self.down.shape
        return f"{experts} x ({width} -> {hidden} -> {width}), {self.activation.value}"

    def forward(self, x: Tensor, counts_E: Tensor, choices: Choices | None = None, keys_R: Tensor | None = None) -> Tensor:
        """Rows (R, D) to (R, D); counts_E (int64) is the number of rows of each expert, R in all or fewer.

        Rows behind those of all experts change no other row and no gradient of a weight, and come out as anything.

        With `choices`, tokens (T, D) to (T, D): gathers the rows of the tokens, and returns the weighted sum of each token's rows.
        keys_R (int64), or the choices' keys_T, are the random keys of the rows' tokens; dropout needs them in training.
        """
        dtype = x.dtype
        gate_up, down = weight_as(self.gate_up, dtype).flatten(1, 2), weight_as(self.down, dtype)
        gate_up_bias = None if self.gate_up_bias is None else self.gate_up_bias.to(dtype).flatten(1)
        down_bias = self.down_bias.to(dtype) if self.down_bias is not None and self.adds_bias else None
        weights_TK, plan = None, ()
        if choices is not None:
            weights_TK, (token_R, slot_TK, _, filled_R, kept_TK) = choices.weights_TK, choices.plan
            plan = token_R, slot_TK, filled_R, kept_TK
        keys_R = self._row_keys(counts_E, choices, keys_R) if self.dropout.drops else None
        deferred = (down, gate_up) if defers(x, gate_up) else None
        gate_up, down = (gate_up.detach(), down.detach()) if deferred else (gate_up, down)
        tensors = x, gate_up, down, gate_up_bias, down_bias, weights_TK, counts_E, keys_R
        settings = self.activation, self.dropout, deferred, self.output_is_sent, self.products
        return ExpertFunction.apply(*settings, *tensors, *plan)  # pyright: ignore[reportReturnType]

    def _row_keys(self, counts_E: Tensor, choices: Choices | None, keys_R: Tensor | None) -> Tensor:
        """int64 (R,): a key for each choice, a function of the token's and of the expert's global id."""
        if choices is not None and choices.keys_T is not None:
            keys_R = choices.keys_T.index_select(0, choices.plan.token_R)
        assert keys_R is not None, "dropout needs the keys of the tokens"
        ids_E = torch.arange(len(counts_E), device=counts_E.device) + self.first_expert
        return fold_in(keys_R, _of_rows(ids_E, counts_E, len(keys_R)))


def experts_by_loop(experts: Experts, x_RD: Tensor, counts_E: Tensor) -> Tensor:
    """The reference of the tests: the same function, one expert after the other."""
    outputs = []
    for expert, rows in enumerate(x_RD.split(counts_E.tolist())):
        inner = rows @ experts.gate_up[expert].flatten(0, 1).T
        if experts.gate_up_bias is not None:
            inner = inner + experts.gate_up_bias[expert].flatten()
        output = activate(experts.activation, inner) @ experts.down[expert].T
        outputs.append(output if experts.down_bias is None else output + experts.down_bias[expert])
    return torch.cat(outputs)
