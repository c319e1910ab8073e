"""The dense feed-forward, of dense layers and of the shared expert, and the activation functions, which experts use too."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Activation, Products
from .device import uses_kernels
from .dropout import Dropout
from .kernels import operators
from .linear import linear
from .token_info import Purpose
from .weight_cast import weight_as

# P projections of the input: 2 (gate and up) with a gate, 1 without. F hidden width.

CLAMP, SLOPE = 7.0, 1.702
"""gpt-oss's swiglu_limit and swiglu_alpha."""


def activate(activation: Activation, x: Tensor, out: Tensor | None = None) -> Tensor:
    """(..., P * F), the gate before up, to (..., F). Writes into `out` if it is given, which is not differentiable."""
    match activation:  # torch's own kernels of these two are the fastest
        case Activation.gelu:
            return F.gelu(x) if out is None else out.copy_(F.gelu(x))
        case Activation.relu:
            return F.relu(x) if out is None else out.copy_(F.relu(x))
    if out is None and uses_kernels(x):
        y = operators.activation(x.flatten(0, -2), activation.value)
        return y.unflatten(0, x.shape[:-1])
    if activation is Activation.relu_squared:  # Primer (So et al. 2021)
        return torch.square(F.relu(x), out=out)
    gate, up = x.chunk(2, dim=-1)
    match activation:
        case Activation.swiglu:  # Shazeer 2020
            return torch.mul(F.silu(gate), up, out=out)
        case Activation.geglu:  # with the tanh approximation, as Gemma and Grok
            return torch.mul(F.gelu(gate, approximate="tanh"), up, out=out)
        case Activation.swiglu_clamped:  # gpt-oss
            gate = gate.clamp(max=CLAMP)
            return torch.mul(gate * (SLOPE * gate).sigmoid(), up.clamp(-CLAMP, CLAMP) + 1, out=out)


ActivationBackward = Callable[[Tensor, Tensor | None], Tensor]
"""Takes the gradient (..., F) of an activation, and returns that of its input, (..., P * F).

Writes it into the second argument unless that is None, as in compiled code.
"""


def activate_with_backward(activation: Activation, x: Tensor) -> tuple[Tensor, ActivationBackward]:
    """Returns `activate(activation, x)` and its backward function, which needs no autograd and so works block by block."""
    if activation is Activation.swiglu:
        return _swiglu(x)
    backward = _gated_backward if activation.projections == 2 else _ungated_backward
    return activate(activation, x), partial(backward, activation, x)


def _swiglu(x: Tensor) -> tuple[Tensor, ActivationBackward]:
    gate, up = x.chunk(2, dim=-1)
    silu = F.silu(gate)

    def backward(grad: Tensor, out: Tensor | None) -> Tensor:
        into_gate, into_up = _halves(out)
        grad_up = torch.mul(grad, silu, out=into_up)
        grad_gate = _derivative(torch.ops.aten.silu_backward, grad * up, gate, into_gate)
        return torch.cat([grad_gate, grad_up], dim=-1) if out is None else out

    return silu * up, backward


def _gated_backward(activation: Activation, x: Tensor, grad: Tensor, out: Tensor | None) -> Tensor:
    (gate, up), (into_gate, into_up) = x.chunk(2, dim=-1), _halves(out)
    if activation is Activation.geglu:
        grad_up = torch.mul(grad, F.gelu(gate, approximate="tanh"), out=into_up)
        grad_gate = _derivative(torch.ops.aten.gelu_backward, grad * up, gate, into_gate, approximate="tanh")
    else:
        assert activation is Activation.swiglu_clamped
        low, shifted = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP) + 1
        sigmoid = (SLOPE * low).sigmoid()
        grad_up = torch.mul(grad * low * sigmoid, up.abs() <= CLAMP, out=into_up)
        grad_gate = torch.mul(grad * shifted * sigmoid * (1 + SLOPE * low * (1 - sigmoid)), gate <= CLAMP, out=into_gate)
    return torch.cat([grad_gate, grad_up], dim=-1) if out is None else out


def _ungated_backward(activation: Activation, x: Tensor, grad: Tensor, out: Tensor | None) -> Tensor:
    match activation:
        case Activation.gelu:
            return _derivative(torch.ops.aten.gelu_backward, grad, x, out)
        case Activation.relu_squared:
            return torch.mul(grad, 2 * F.relu(x), out=out)
        case _:
            return torch.mul(grad, x > 0, out=out)


def _halves(out: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns where the gradients of gate and up go."""
    if out is None:
        return None, None
    gate, up = out.chunk(2, dim=-1)
    return gate, up


def _derivative(operator: Any, grad: Tensor, x: Tensor, out: Tensor | None, **settings: str) -> Tensor:
    """Returns the result of torch's backward operator, written into `out` if there is one."""
    return operator(grad, x, **settings) if out is None else operator.grad_input(grad, x, **settings, grad_input=out)


class FeedForward(nn.Module):
    """down(f(gate(x), up(x))), or without a gate down(f(up(x))), for x of shape (..., D).

    Weights: gate_up (P, hidden, D), gate and up or up alone, and down (D, hidden). `dropout` is the rate of dropout after f, by the
    `keys` (...) of the tokens, which it needs in training.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        dtype: torch.dtype,
        activation: Activation = Activation.swiglu,
        dropout: float = 0.0,
        products: Products = Products.wide,
    ) -> None:
        super().__init__()
        self.products = products
        self.activation = activation
        self.dropout = Dropout(dropout, Purpose.hidden_dropout)
        self.gate_up = nn.Parameter(torch.empty(activation.projections, hidden, width, dtype=dtype))
        self.down = nn.Parameter(torch.empty(width, hidden, dtype=dtype))

    def extra_repr(self) -> str:
        width, hidden = self.down.shape
        return f"{width} -> {hidden} -> {width}, {self.activation.value}"

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        return self.down_product(self.hidden_columns(x, keys))

    def hidden_columns(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Returns what the last product takes, (..., F)."""
        hidden = activate(self.activation, linear(x, weight_as(self.gate_up, x.dtype).flatten(0, 1), products=self.products))
        return self.dropout(hidden, keys)

    def down_product(self, hidden: Tensor) -> Tensor:
        """(..., F) to (..., D)."""
        return linear(hidden, weight_as(self.down, hidden.dtype), products=self.products)
