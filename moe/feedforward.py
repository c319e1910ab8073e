"""The dense feed-forward: dense layers, and the shared expert of MoE layers."""

import torch
from torch import Tensor, nn

from .activations import activate, projections
from .config import Activation
from .products import linear


class FeedForward(nn.Module):
    """down(f(gate(x), up(x))), or without a gate down(f(up(x))), for x of shape (..., D).

    Weights: gate_up (P, hidden, D), gate and up or up alone, and down (D, hidden).
    """

    def __init__(self, width: int, hidden: int, dtype: torch.dtype, activation: Activation = Activation.swiglu) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up = nn.Parameter(torch.empty(projections(activation), hidden, width, dtype=dtype))
        self.down = nn.Parameter(torch.empty(width, hidden, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        between = activate(self.activation, linear(x, self.gate_up.flatten(0, 1)))
        return linear(between, self.down)
