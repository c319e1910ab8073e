"""Which experts each token chooses, from scores. No gradient passes here.

B sequences, S tokens of each, E router columns (experts, then null experts), K choices per token, T tokens of a scope, G scopes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .capacity import OneDevice, best_of_scope
from .config import GroupScore, MoEConfig, RouterConfig, Selection
from .device import kind_of
from .noise import Purpose, uniform

SINKHORN_ROUNDS = 8
"""Balances to a few percent on the logits of real routers; more rounds cost an all-reduce each."""


class Choice(NamedTuple):
    """(B, S, K) expert ids, and which of them were made: all (None) but for expert choice, where K is E."""

    experts_BSK: Tensor
    made_BSK: Tensor | None = None


@torch.no_grad()
def choose(
    ranked_BSE: Tensor, valid_BS: Tensor | None, config: MoEConfig, surroundings: OneDevice, training: bool, capacity: int | None
) -> Choice:
    """`ranked_BSE` is what experts are ranked by: scores (logits for softmax_after_top_k), plus the expert bias if there is one.

    Ties go to the lower expert id, and in expert choice to the earlier token.
    """
    match config.router.selection:
        case Selection.expert_choice:
            assert capacity is not None
            return _expert_choice(ranked_BSE, valid_BS, config, surroundings, capacity)
        case Selection.sinkhorn if training:
            ranked_BSE = ranked_BSE + _prices(ranked_BSE, valid_BS, config, surroundings)
    if config.router.groups > 1:
        ranked_BSE = in_best_groups(ranked_BSE, config.router)
    return Choice(best(ranked_BSE, config.top_k))


def best(ranked_BSE: Tensor, top_k: int) -> Tensor:
    """Ids of the K largest, largest first, NaN before all; of equal values the first, while torch.topk does not say which it takes.

    A stable sort is two operators whatever K is, and on a CPU takes two to four times as long as K maxima.
    """
    if kind_of(ranked_BSE) != "cpu":
        return ranked_BSE.sort(dim=-1, descending=True, stable=True).indices[..., :top_k].contiguous()
    left_BSE, chosen = ranked_BSE.clone(), []
    for _ in range(top_k):
        chosen.append(left_BSE.argmax(dim=-1, keepdim=True))
        left_BSE.scatter_(-1, chosen[-1], -torch.inf)
    return torch.cat(chosen, dim=-1)


def in_best_groups(ranked_BSE: Tensor, router: RouterConfig) -> Tensor:
    """-inf outside of each token's best groups (DeepSeek-V2, section 2.1.2; DeepSeek-V3 ranks by the two best of a group)."""
    grouped = ranked_BSE.unflatten(-1, (router.groups, -1))
    places = 1 if router.group_score is GroupScore.max else 2
    groups = best(grouped.topk(places, dim=-1).values.sum(dim=-1), router.top_groups)
    outside = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=grouped.device).scatter_(-1, groups, False)
    return grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)


def second_is_kept(weights_BSK: Tensor, key_BS: Tensor) -> Tensor:
    """(B, S, 2): the first expert always, the second with probability min(1, 2 x its share of the weights) (GShard, alg. 1)."""
    share_BS = weights_BSK[..., 1] / weights_BSK.sum(dim=-1)
    second_BS = uniform(key_BS, 1, Purpose.second_expert).squeeze(-1) < 2 * share_BS
    return torch.stack([torch.ones_like(second_BS), second_BS], dim=-1)


def _expert_choice(
    scores_BSE: Tensor, valid_BS: Tensor | None, config: MoEConfig, surroundings: OneDevice, capacity: int
) -> Choice:
    """Each expert takes its best tokens of the scope (Zhou et al. 2022). Later tokens decide about earlier ones."""
    if valid_BS is not None:
        scores_BSE = scores_BSE.masked_fill(~valid_BS.unsqueeze(-1), -torch.inf)
    made_BSE = best_of_scope(scores_BSE, capacity, config.capacity.scope, surroundings)
    return Choice(torch.arange(scores_BSE.shape[-1], device=scores_BSE.device).expand(scores_BSE.shape), made_BSE)


def _prices(logits_BSE: Tensor, valid_BS: Tensor | None, config: MoEConfig, surroundings: OneDevice) -> Tensor:
    """(B or 1, 1, E): what Sinkhorn's iteration adds to the logits so that all experts get an equal share of the scope.

    S-BASE (Clark et al. 2022). The other factor is one per token, and does not change a token's order of experts.
    """
    prices = logits_BSE.new_zeros(1, 1, logits_BSE.shape[-1])
    for _ in range(SINKHORN_ROUNDS):
        share_BSE = (logits_BSE + prices).softmax(dim=-1)
        if valid_BS is not None:
            share_BSE = share_BSE * valid_BS.unsqueeze(-1)
        load = surroundings.total(share_BSE.sum(dim=1), config.balance.scope).unsqueeze(1)
        load = load.clamp(min=torch.finfo(load.dtype).tiny)
        prices = prices + load.mean(dim=-1, keepdim=True).log() - load.log()
    return prices
