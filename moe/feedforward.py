"""The dense SwiGLU feed-forward (Shazeer 2020): dense layers, and the shared expert of MoE layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) for x of shape (..., D); gate and up are one tensor of shape (2, hidden, D)."""

    def __init__(self, width: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2, hidden, width, dtype=dtype))
        self.down = nn.Parameter(torch.empty(width, hidden, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up.to(x.dtype).flatten(0, 1)).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down.to(x.dtype))
