"""The functions between a feed-forward's two products.

P projections of the input: 2 (gate and up) with a gate, 1 without. F hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Activation

GATED = {Activation.swiglu, Activation.geglu, Activation.swiglu_clamped}

CLAMP, SLOPE = 7.0, 1.702
"""gpt-oss's swiglu_limit and swiglu_alpha."""


def projections(activation: Activation) -> int:
    """P."""
    return 2 if activation in GATED else 1


def activate(activation: Activation, x: Tensor) -> Tensor:
    """(..., P * F), the gate before up, to (..., F)."""
    match activation:
        case Activation.gelu:
            return F.gelu(x)
        case Activation.relu:
            return F.relu(x)
        case Activation.relu_squared:  # Primer (So et al. 2021)
            return F.relu(x).square()
    gate, up = x.chunk(2, dim=-1)
    match activation:
        case Activation.swiglu:  # Shazeer 2020
            return F.silu(gate) * up
        case Activation.geglu:  # with the tanh approximation, as Gemma and Grok
            return F.gelu(gate, approximate="tanh") * up
        case Activation.swiglu_clamped:  # gpt-oss
            gate = gate.clamp(max=CLAMP)
            return gate * (SLOPE * gate).sigmoid() * (up.clamp(-CLAMP, CLAMP) + 1)


def activate_backward(activation: Activation, grad: Tensor, x: Tensor, out: Tensor) -> None:
    """The gradient (..., P * F) of x goes to `out`; `grad` (..., F) is that of what `activate` makes of x."""
    if activation not in GATED:
        out.copy_(_ungated_backward(activation, grad, x))
        return
    (gate, up), (grad_gate, grad_up) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    match activation:
        case Activation.swiglu:
            torch.mul(grad, F.silu(gate), out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        case Activation.geglu:
            torch.mul(grad, F.gelu(gate, approximate="tanh"), out=grad_up)
            torch.ops.aten.gelu_backward.grad_input(grad * up, gate, approximate="tanh", grad_input=grad_gate)
        case Activation.swiglu_clamped:
            low, shifted = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP) + 1
            chance = (SLOPE * low).sigmoid()
            torch.mul(grad * low * chance, up.abs() <= CLAMP, out=grad_up)
            torch.mul(grad * shifted * chance * (1 + SLOPE * low * (1 - chance)), gate <= CLAMP, out=grad_gate)


def _ungated_backward(activation: Activation, grad: Tensor, x: Tensor) -> Tensor:
    match activation:
        case Activation.gelu:
            return torch.ops.aten.gelu_backward(grad, x)
        case Activation.relu_squared:
            return grad * (2 * F.relu(x))
        case _:
            return grad * (x > 0)
