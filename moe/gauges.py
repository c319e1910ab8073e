"""What one layer's router and experts did with the valid tokens of this device, beside counts: numbers to watch, without gradient.

B sequences, S tokens of each, E router columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SUMS = ("tokens", "entropy", "top1", "logit_norm", "rows")
"""The columns G of `Gauges.sums`, in this order. They add up over micro-batches and ranks."""


class Gauges(NamedTuple):
    """Scalars; the first five add up, the last one is a maximum."""

    tokens: Tensor
    """Valid tokens."""
    entropy: Tensor
    """Sum over tokens of the entropy of the router's probabilities, nats."""
    top1: Tensor
    """Sum over tokens of the largest of those probabilities."""
    logit_norm: Tensor
    """Sum over tokens of the Euclidean norm of the logits; 0 where there are none."""
    rows: Tensor
    """Rows that this device's experts computed, padding included; of tokens of other ranks too."""
    logit_max: Tensor
    """Largest absolute logit."""

    def sums(self) -> Tensor:
        """(G,), fp64: exact for numbers of tokens."""
        return torch.stack([getattr(self, name).double() for name in SUMS])


@torch.no_grad()
def gauge(logits_BSE: Tensor | None, probabilities_BSE: Tensor, valid_BS: Tensor) -> Gauges:
    """Without the rows, which nobody knows before dispatch."""
    wide, tokens = probabilities_BSE.dtype, valid_BS.sum()
    valid_T = valid_BS.flatten().to(wide)
    none = valid_T.new_zeros(())
    entropy = torch.special.entr(probabilities_BSE).sum(-1).flatten().dot(valid_T)
    top1 = probabilities_BSE.amax(-1).flatten().dot(valid_T)
    if logits_BSE is None:
        return Gauges(tokens, entropy, top1, none, none, none)
    logits_TE = logits_BSE.detach().flatten(0, 1)
    norm = torch.linalg.vector_norm(logits_TE, dim=-1).dot(valid_T)
    largest = (logits_TE.abs().amax(-1) * valid_T).amax() if len(logits_TE) else none
    return Gauges(tokens, entropy, top1, norm, none, largest)
