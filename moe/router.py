"""From tokens to their experts: scores, top-k, capacity, and the statistics that losses and metrics are made of.

B sequences, S tokens of each, T = B * S tokens, D width, E experts, K chosen experts per token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .capacity import OneDevice, Tokens, keep
from .config import MoEConfig


class RoutingStats(NamedTuple):
    """What one MoE layer's router did with the valid tokens of this device. Sums, so that ranks can add theirs."""

    counts_BE: Tensor
    """int64: tokens of each sequence that chose each expert, before any is dropped; sums to valid tokens x K."""
    scores_BE: Tensor
    """Sum over each sequence's tokens of the router's probabilities; carries the balance loss's gradient."""
    z: Tensor
    """Scalar: sum over tokens of logsumexp(logits) ** 2; carries the z-loss's gradient."""
    dropped: Tensor
    """int64 scalar: choices that found their expert full."""


class Routing(NamedTuple):
    """Each token's experts and the weights of their outputs."""

    experts_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor | None
    """False where the expert was full; None where nothing can be dropped."""
    stats: RoutingStats


class Router(nn.Module):
    """Softmax over all experts, then the K likeliest (Mixtral, OLMoE; Switch for K = 1), in fp32 or wider whatever x is."""

    def __init__(self, width: int, config: MoEConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, width, dtype=dtype))
        self.surroundings = OneDevice()

    def forward(self, x_BSD: Tensor, valid_BS: Tensor | None = None) -> Routing:
        """Route (B, S, D). Tokens outside valid_BS are not counted, and take no capacity. Only training drops tokens."""
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        logits_BSE = F.linear(x_BSD.to(wide), self.weight.to(wide))
        scores_BSE = logits_BSE.softmax(dim=-1)
        weights_BSK, experts_BSK = scores_BSE.topk(self.config.top_k, dim=-1)
        if self.config.router.normalize_top_k and self.config.top_k > 1:
            weights_BSK = weights_BSK / weights_BSK.sum(dim=-1, keepdim=True)
        counts_BE = count_choices(experts_BSK, valid_BS, self.config.experts)
        kept_BSK = None
        if self.training and self.config.capacity.factor is not None:
            kept_BSK = keep(Tokens(experts_BSK, valid_BS, counts_BE), self.config, self.surroundings)
        stats = _statistics(logits_BSE, scores_BSE, valid_BS, counts_BE, kept_BSK)
        kept_TK = None if kept_BSK is None else kept_BSK.flatten(0, 1)
        return Routing(experts_BSK.flatten(0, 1), weights_BSK.flatten(0, 1), kept_TK, stats)


def count_choices(experts_BSK: Tensor, valid_BS: Tensor | None, experts: int) -> Tensor:
    """int64 (B, E): how many valid tokens of each sequence chose each expert."""
    chosen_BA = experts_BSK.flatten(1)
    ones_BA = torch.ones_like(chosen_BA) if valid_BS is None else valid_BS.long()[..., None].expand_as(experts_BSK).flatten(1)
    return chosen_BA.new_zeros(len(chosen_BA), experts).scatter_add_(1, chosen_BA, ones_BA)


def _statistics(
    logits_BSE: Tensor, scores_BSE: Tensor, valid_BS: Tensor | None, counts_BE: Tensor, kept_BSK: Tensor | None
) -> RoutingStats:
    z_BS = logits_BSE.logsumexp(dim=-1).square()
    if valid_BS is not None:
        z_BS = z_BS * valid_BS
        scores_BSE = scores_BSE * valid_BS[..., None]
    kept = counts_BE.sum() if kept_BSK is None else kept_BSK.sum()
    return RoutingStats(counts_BE, scores_BSE.sum(dim=1), z_BS.sum(), counts_BE.sum() - kept)
