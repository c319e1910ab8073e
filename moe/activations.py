"""The functions between a feed-forward's two products.

P projections of the input: 2 (gate and up) with a gate, 1 without. F hidden width.
"""

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
