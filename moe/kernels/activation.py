"""Triton kernels of the activations, forward and backward. In fp32 inside; each input is read once and each output written once.

R rows, F hidden width, P projections of the input, the gate before up. A program owns whole rows, so the gradient of a row's weight
needs no atomic additions, and every run gives the same bits. Comparisons are written so that NaN stays NaN.
"""

# Launches pass numbers where kernels declare constants.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import Activation
from .rows import columns_of_program


@triton.jit
def _gelu_tanh(x):
    """Returns the tanh approximation of GELU, and its derivative."""
    cubic = 0.044715 * x * x
    tanh = 2.0 * tl.sigmoid(1.5957691216057308 * x * (1.0 + cubic)) - 1.0  # 2 sqrt(2 / pi)
    inner = 0.7978845608028654 * (1.0 + 3.0 * cubic)
    return 0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner


@triton.jit
def _with_derivatives(gate, up, KIND: tl.constexpr):
    """Returns the activation and its derivatives by gate and up. Without a gate, up is ignored and its derivative is 0."""
    if KIND == "swiglu":
        sigmoid = tl.sigmoid(gate)
        by_up = gate * sigmoid
        active, by_gate = by_up * up, up * (sigmoid + by_up * (1.0 - sigmoid))
    elif KIND == "geglu":
        by_up, slope = _gelu_tanh(gate)
        active, by_gate = by_up * up, up * slope
    elif KIND == "swiglu_clamped":  # 7 and 1.702 are CLAMP and SLOPE of feedforward.py
        low = tl.where(gate > 7.0, 7.0, gate)
        shifted = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1.0
        sigmoid = tl.sigmoid(1.702 * low)
        by_gate = tl.where(gate > 7.0, 0.0, shifted * sigmoid * (1.0 + 1.702 * low * (1.0 - sigmoid)))
        active, by_up = low * sigmoid * shifted, tl.where(tl.abs(up) > 7.0, 0.0, low * sigmoid)
    elif KIND == "gelu":
        normal = 0.5 * (1.0 + tl.erf(0.7071067811865476 * gate))
        active, by_gate, by_up = (
            gate * normal,
            normal + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate),
            tl.zeros_like(gate),
        )
    elif KIND == "relu":
        active, by_gate, by_up = tl.where(gate < 0.0, 0.0, gate), tl.where(gate > 0.0, 1.0, 0.0), tl.zeros_like(gate)
    else:
        tl.static_assert(KIND == "relu_squared")
        relu = tl.where(gate < 0.0, 0.0, gate)
        active, by_gate, by_up = relu * relu, 2.0 * relu, tl.zeros_like(gate)
    return active, by_gate, by_up


@triton.jit
def _activate(x_ptr, out_ptr, F, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    source = x_ptr + row * (2 * F if GATED else F) + columns
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + F, mask=inside, other=0.0).to(tl.float32) if GATED else gate
    active, _, _ = _with_derivatives(gate, up, KIND)
    tl.store(out_ptr + row * F + columns, active.to(out_ptr.dtype.element_ty), mask=inside)


def activate(x_RN: Tensor, kind: str) -> Tensor:
    """(R, F): see `feedforward.activate`; `kind` is the name of the activation."""
    projections = Activation(kind).projections
    x_RN, rows, hidden = x_RN.contiguous(), len(x_RN), x_RN.shape[1] // projections
    out_RF = x_RN.new_empty(rows, hidden)
    if out_RF.numel():
        block = columns_of_program(hidden)
        _activate[rows, triton.cdiv(hidden, block)](x_RN, out_RF, hidden, kind, projections == 2, block)
    return out_RF


@triton.jit
def _activate_backward(
    x_ptr,
    grad_ptr,
    weight_ptr,
    grad_x_ptr,
    dot_ptr,
    F,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    KEEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_ptr + row) if WEIGHTED else 1.0
    dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, F, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < F
        source = row * (2 * F if GATED else F) + columns
        gate = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + source + F, mask=inside, other=0.0).to(tl.float32) if GATED else gate
        grad = tl.load(grad_ptr + row * F + columns, mask=inside, other=0.0).to(tl.float32)
        active, by_gate, by_up = _with_derivatives(gate, up, KIND)
        dot += active * grad
        grad *= weight
        tl.store(grad_x_ptr + source, (grad * by_gate).to(grad_x_ptr.dtype.element_ty), mask=inside)
        if GATED:
            tl.store(grad_x_ptr + source + F, (grad * by_up).to(grad_x_ptr.dtype.element_ty), mask=inside)
        if KEEPS:
            tl.store(grad_ptr + row * F + columns, (active * weight).to(grad_ptr.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(dot_ptr + row, tl.sum(dot, 0))


def activate_backward(x_RN: Tensor, grad_RF: Tensor, weights_R: Tensor | None, kind: str, keeps: bool) -> tuple[Tensor, Tensor]:
    """Returns the gradient of x (R, P * F), and that of the weights (R,) in fp32, empty without weights.

    `grad_RF` is the gradient of the activation of a row with weight 1. If `keeps`, the activation times its row's weight takes its
    place, which the gradient of the next product needs.
    """
    x_RN, (rows, hidden) = x_RN.contiguous(), grad_RF.shape
    assert grad_RF.is_contiguous()
    grad_x_RN = torch.empty_like(x_RN)
    grad_weights_R = x_RN.new_empty(0 if weights_R is None else rows, dtype=torch.float32)
    weights_R = None if weights_R is None else weights_R.float().contiguous()
    if grad_RF.numel():
        tensors = x_RN, grad_RF, weights_R, grad_x_RN, grad_weights_R
        flags = Activation(kind).projections == 2, weights_R is not None, keeps
        _activate_backward[rows,](*tensors, hidden, kind, *flags, columns_of_program(hidden))
    return grad_x_RN, grad_weights_R
