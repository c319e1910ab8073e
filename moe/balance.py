"""Load-balance loss and router z-loss as sums over this device's tokens; adding all ranks' values gives the global loss.

L MoE layers, B sequences, E experts, K choices per token.
"""

from torch import Tensor


def balance_loss(counts: Tensor, scores: Tensor, tokens: Tensor, top_k: int) -> Tensor:
    """Switch Transformer's load-balance loss (Fedus et al. 2021, eq. 4-6; GShard's for K = 2), one value per leading index.

    counts (..., E): int64 choices of the WHOLE scope, on every rank the same; scores (..., E): sums of router probabilities of
    this device's tokens; tokens (...): valid tokens of the whole scope. The result E * sum_e f_e * P_e is linear in `scores`,
    so it needs no gradient through a collective; it is 1 when the load is even.
    """
    fraction = counts.to(scores.dtype) / (tokens * top_k).clamp(min=1).unsqueeze(-1)  # two int64 would give fp32
    mean_score = scores / tokens.clamp(min=1).unsqueeze(-1)
    return counts.shape[-1] * (fraction * mean_score).sum(dim=-1)
