"""From token vectors to logits, scores and the weights of the chosen experts, in fp32 or wider.

B sequences, S tokens of each, D width, E router columns (experts, then null experts), K chosen experts per token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .capacity import LocalScope, best_of_scope
from .config import GroupScore, MoEConfig, RouterConfig, Score, Selection
from .device import kind_of
from .linear import wide_linear
from .token_info import Purpose, TokenInfo, fold_in, normal, uniform

TINY = 1e-20
"""Keeps quotients of scores that all vanished finite, and changes no other (DeepSeek-V3)."""


class Noisy(NamedTuple):
    """Logits with learned noise, and what they are made of."""

    logits_BSE: Tensor
    clean_BSE: Tensor
    std_BSE: Tensor


def project(x: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """(..., D) to logits (..., E) in fp32 or wider, whatever x and the weights are. Of x what is kept is x, not a wider copy."""
    logits = wide_linear(x, weight_ED, torch.promote_types(x.dtype, torch.float32))
    return logits if bias_E is None else logits + bias_E.to(logits.dtype)


def jittered(x_BSD: Tensor, key_BS: Tensor, jitter: float) -> Tensor:
    """Each element times uniform noise from 1 - jitter to 1 + jitter (Switch Transformer)."""
    factor_BSD = 1 + jitter * (2 * uniform(key_BS, x_BSD.shape[-1], Purpose.jitter) - 1)
    return x_BSD * factor_BSD.to(x_BSD.dtype)


def noisy(clean_BSE: Tensor, widths_BSE: Tensor, key_BS: Tensor) -> Noisy:
    """Logits + normal noise * softplus(widths) (Shazeer et al. 2017, eq. 4)."""
    std_BSE = F.softplus(widths_BSE)
    noise_BSE = normal(key_BS, clean_BSE.shape[-1]).to(clean_BSE.dtype)
    return Noisy(clean_BSE + noise_BSE * std_BSE, clean_BSE, std_BSE)


def score(logits_BSE: Tensor, kind: Score) -> Tensor:
    """Positive scores; only those of softmax sum to one."""
    match kind:
        case Score.softmax:
            return logits_BSE.softmax(dim=-1)
        case Score.sigmoid:
            return logits_BSE.sigmoid()
        case Score.sqrtsoftplus:
            # The clamp keeps the root's derivative finite where softplus underflows.
            return F.softplus(logits_BSE).clamp(min=torch.finfo(logits_BSE.dtype).tiny).sqrt()


def hash_scores(tokens: TokenInfo, columns: int, top_k: int, dtype: torch.dtype) -> Tensor:
    """1 for the K experts of each token's id and 0 for the others (Hash Layers, Roller et al. 2021), another table in each layer.

    Every run of E ids, from a multiple of E on, meets each expert equally often.
    """
    assert tokens.ids_BS is not None, "hash selection needs the token ids"
    run_BS, place_BS = tokens.ids_BS // columns, tokens.ids_BS % columns
    order_BSE = uniform(fold_in(run_BS, tokens.layer), columns, Purpose.hash).argsort(dim=-1)
    distance_BSE = (order_BSE.argsort(dim=-1) - place_BS.unsqueeze(-1)) % columns
    return (distance_BSE < top_k).to(dtype)


def probabilities(scores_BSE: Tensor, router: RouterConfig) -> Tensor:
    """Scores that sum to one over the experts (DeepSeek-V3, eq. 19), which balance losses take."""
    if router.score is Score.softmax and router.selection is not Selection.hash:
        return scores_BSE
    return scores_BSE / (scores_BSE.sum(dim=-1, keepdim=True) + TINY)


def gate_weights(logits_BSE: Tensor | None, scores_BSE: Tensor, experts_BSK: Tensor, config: MoEConfig) -> Tensor:
    """(B, S, K): the chosen experts' scores, normalised and scaled as the router is configured."""
    router = config.router
    if router.softmax_after_top_k:
        assert logits_BSE is not None
        weights_BSK = logits_BSE.gather(-1, experts_BSK).softmax(dim=-1)
    else:
        weights_BSK = scores_BSE.gather(-1, experts_BSK)
        if router.normalize_top_k and config.top_k > 1 and router.selection is not Selection.expert_choice:
            weights_BSK = weights_BSK / (weights_BSK.sum(dim=-1, keepdim=True) + TINY)
    return weights_BSK if router.scale == 1.0 else weights_BSK * router.scale


def chance_of_choice(noise: Noisy, top_k: int) -> Tensor:
    """(B, S, E): the probability that the expert is among the K best if its own noise is drawn again (Shazeer 2017, eq. 9)."""
    best_BSK = noise.logits_BSE.topk(top_k + 1, dim=-1).values
    rival_BSE = torch.where(noise.logits_BSE > best_BSK[..., -1:], best_BSK[..., -1:], best_BSK[..., -2:-1])
    return torch.special.ndtr((noise.clean_BSE - rival_BSE) / noise.std_BSE.clamp(min=1e-6))


# Which experts each token chooses, from scores. No gradient passes here.
#
# B sequences, S tokens of each, E router columns (experts, then null experts), K choices per token, T tokens of a scope, G
# scopes.

SINKHORN_ROUNDS = 8
"""Balances to a few percent on the logits of real routers; more rounds cost an all-reduce each."""


class Choice(NamedTuple):
    """(B, S, K) expert ids, and which of them were made: all (None) but for expert choice, where K is E."""

    experts_BSK: Tensor
    made_BSK: Tensor | None = None


@torch.no_grad()
def choose(
    ranked_BSE: Tensor, valid_BS: Tensor | None, config: MoEConfig, surroundings: LocalScope, training: bool, capacity: int | None
) -> Choice:
    """`ranked_BSE` is what experts are ranked by: scores (logits for softmax_after_top_k), plus the expert bias if there is one.

    Ties go to the lower expert id, and in expert choice to the earlier token.
    """
    match config.router.selection:
        case Selection.expert_choice:
            assert capacity is not None
            return _expert_choice(ranked_BSE, valid_BS, config, surroundings, capacity)
        case Selection.sinkhorn if training:
            ranked_BSE = ranked_BSE + _sinkhorn_duals(ranked_BSE, valid_BS, config, surroundings)
    if config.router.groups > 1:
        ranked_BSE = in_best_groups(ranked_BSE, config.router)
    return Choice(best(ranked_BSE, config.top_k))


def best(ranked_BSE: Tensor, top_k: int) -> Tensor:
    """Ids of the K largest, largest first, NaN before all; of equal values the first, while torch.topk does not say which it takes.

    A stable sort is two operators whatever K is, and on a CPU takes up to four times as long as K maxima.
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
    scores_BSE: Tensor, valid_BS: Tensor | None, config: MoEConfig, surroundings: LocalScope, capacity: int
) -> Choice:
    """Each expert takes its best tokens of the scope (Zhou et al. 2022). Later tokens decide about earlier ones."""
    if valid_BS is not None:
        scores_BSE = scores_BSE.masked_fill(~valid_BS.unsqueeze(-1), -torch.inf)
    made_BSE = best_of_scope(scores_BSE, capacity, config.capacity.scope, surroundings)
    return Choice(torch.arange(scores_BSE.shape[-1], device=scores_BSE.device).expand(scores_BSE.shape), made_BSE)


def _sinkhorn_duals(logits_BSE: Tensor, valid_BS: Tensor | None, config: MoEConfig, surroundings: LocalScope) -> Tensor:
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
