"""Metrics of a router, which telemetry logs.

B sequences, S tokens of each, T = B * S tokens, E router columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SUMS = ("tokens", "entropy", "top1", "logit_norm", "rows")
"""The fields of `RouterMetrics.sums`, in this order (G). They add up over micro-batches and ranks."""


class RouterMetrics(NamedTuple):
    """Scalars of one layer over the valid tokens of this device, without gradient. All add up but the last, which is a maximum."""

    tokens: Tensor
    """Valid tokens."""
    entropy: Tensor
    """Sum over tokens of the entropy of the router's probabilities, in nats."""
    top1: Tensor
    """Sum over tokens of the largest probability."""
    logit_norm: Tensor
    """Sum over tokens of the Euclidean norm of the logits; 0 if there are no logits."""
    rows: Tensor
    """Rows that this device's experts computed, padding and tokens of other ranks included."""
    logit_max: Tensor
    """Largest absolute logit."""

    def sums(self) -> Tensor:
        """(G,), fp64: exact for numbers of tokens."""
        return torch.stack([getattr(self, name).double() for name in SUMS])


@torch.no_grad()
def compute_router_metrics(logits_BSE: Tensor | None, probabilities_BSE: Tensor, valid_BS: Tensor) -> RouterMetrics:
    """Computes all metrics but `rows`, which is known only after dispatch."""
    wide, tokens = probabilities_BSE.dtype, valid_BS.sum()
    valid_T = valid_BS.flatten().to(wide)
    none = valid_T.new_zeros(())
    entropy = torch.special.entr(probabilities_BSE).sum(-1).flatten().dot(valid_T)
    top1 = probabilities_BSE.amax(-1).flatten().dot(valid_T)
    if logits_BSE is None:
        return RouterMetrics(tokens, entropy, top1, none, none, none)
    logits_TE = logits_BSE.detach().flatten(0, 1)
    norm = torch.linalg.vector_norm(logits_TE, dim=-1).dot(valid_T)
    largest = (logits_TE.abs().amax(-1) * valid_T).amax() if len(logits_TE) else none
    return RouterMetrics(tokens, entropy, top1, norm, none, largest)
