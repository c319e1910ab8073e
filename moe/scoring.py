"""From token vectors to logits, scores, the chosen experts and their gate weights, in fp32 or wider.

B sequences, S tokens of each, D width, E router columns (experts, then null experts), K chosen experts per token.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .capacity import LocalScope, best_of_scope
from .config import GroupScore, MoEConfig, RouterConfig, Score, Selection
from .device import kind_of
from .linear import wide_linear
from .recompute import keep
from .token_info import Purpose, TokenInfo, fold_in, random_normal, random_uniform

TINY = 1e-20
"""Keeps quotients finite if all scores are 0, and changes no others (DeepSeek-V3)."""


class NoisyLogits(NamedTuple):
    """Logits with learned noise, the logits without it, and the standard deviation of the noise."""

    logits_BSE: Tensor
    clean_BSE: Tensor
    std_BSE: Tensor


def router_logits(x: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """(..., D) to logits (..., E) in fp32 or wider, whatever the dtypes. Saves x itself for the backward pass, not a wider copy."""
    logits = wide_linear(x, weight_ED, torch.promote_types(x.dtype, torch.float32))
    return logits if bias_E is None else logits + bias_E.to(logits.dtype)


def apply_jitter(x_BSD: Tensor, key_BS: Tensor, jitter: float) -> Tensor:
    """Multiplies each element by uniform noise from 1 - jitter to 1 + jitter (Switch Transformer)."""
    factor_BSD = 1 + jitter * (2 * random_uniform(key_BS, x_BSD.shape[-1], Purpose.jitter) - 1)
    return x_BSD * factor_BSD.to(x_BSD.dtype)


def add_noise(clean_BSE: Tensor, widths_BSE: Tensor, key_BS: Tensor) -> NoisyLogits:
    """Logits + normal noise * softplus(widths) (Shazeer et al. 2017, eq. 4)."""
    std_BSE = F.softplus(widths_BSE)
    noise_BSE = random_normal(key_BS, clean_BSE.shape[-1]).to(clean_BSE.dtype)
    return NoisyLogits(clean_BSE + noise_BSE * std_BSE, clean_BSE, std_BSE)


def to_scores(logits_BSE: Tensor, kind: Score) -> Tensor:
    """Returns positive scores; only those of softmax sum to one."""
    match kind:
        case Score.softmax:
            return logits_BSE.softmax(dim=-1)
        case Score.sigmoid:
            return logits_BSE.sigmoid()
        case Score.sqrtsoftplus:
            # The clamp keeps the derivative of the square root finite where softplus underflows.
            return F.softplus(logits_BSE).clamp(min=torch.finfo(logits_BSE.dtype).tiny).sqrt()


def hash_scores(tokens: TokenInfo, columns: int, top_k: int, dtype: torch.dtype) -> Tensor:
    """1 for the K experts of each token's id, 0 for the others (Hash Layers, Roller et al. 2021). Each layer has another table.

    Each run of E consecutive ids, from a multiple of E on, uses every expert equally often.
    """
    assert tokens.ids_BS is not None, "hash selection needs the token ids"
    run_BS, index_BS = tokens.ids_BS // columns, tokens.ids_BS % columns
    order_BSE = random_uniform(fold_in(run_BS, tokens.layer), columns, Purpose.hash).argsort(dim=-1)
    distance_BSE = (order_BSE.argsort(dim=-1) - index_BS.unsqueeze(-1)) % columns
    return (distance_BSE < top_k).to(dtype)


def normalize_scores(scores_BSE: Tensor, router: RouterConfig) -> Tensor:
    """Divides scores by their sum over the experts (DeepSeek-V3, eq. 19), for the balance losses."""
    if router.score is Score.softmax and router.selection is not Selection.hash:
        return scores_BSE
    return scores_BSE / (scores_BSE.sum(dim=-1, keepdim=True) + TINY)


def gate_weights(logits_BSE: Tensor | None, scores_BSE: Tensor, experts_BSK: Tensor, config: MoEConfig) -> Tensor:
    """(B, S, K): the scores of the chosen experts, normalised and scaled as the router is configured."""
    router = config.router
    if router.softmax_after_top_k:
        assert logits_BSE is not None
        weights_BSK = logits_BSE.gather(-1, experts_BSK).softmax(dim=-1)
    else:
        weights_BSK = scores_BSE.gather(-1, experts_BSK)
        several = config.top_k > 1 or router.normalize_one
        if router.normalize_top_k and several and router.selection is not Selection.expert_choice:
            weights_BSK = weights_BSK / (weights_BSK.sum(dim=-1, keepdim=True) + TINY)
    return weights_BSK if router.scale == 1.0 else weights_BSK * router.scale


def selection_probability(noise: NoisyLogits, top_k: int) -> Tensor:
    """(B, S, E): the probability that an expert is in the top K if its own noise is drawn again (Shazeer 2017, eq. 9)."""
    best_BSK = noise.logits_BSE.topk(top_k + 1, dim=-1).values
    rival_BSE = torch.where(noise.logits_BSE > best_BSK[..., -1:], best_BSK[..., -1:], best_BSK[..., -2:-1])
    return torch.special.ndtr((noise.clean_BSE - rival_BSE) / noise.std_BSE.clamp(min=1e-6))


# Which experts each token chooses, from scores. Not differentiable.

SINKHORN_ROUNDS = 8
"""Enough to balance the logits of real routers to a few percent; each round costs an all-reduce."""


class ChosenExperts(NamedTuple):
    """Expert ids (B, S, K). `mask_BSK` is None except in expert choice, where K is E and it marks the choices that were made."""

    experts_BSK: Tensor
    mask_BSK: Tensor | None = None


@torch.no_grad()
def choose_experts(
    ranked_BSE: Tensor, valid_BS: Tensor | None, config: MoEConfig, scopes: LocalScope, training: bool, capacity: int | None
) -> ChosenExperts:
    """Chooses by `ranked_BSE`: scores, or logits for softmax_after_top_k, plus the expert bias if there is one.

    Of equal values the lower expert id wins; in expert choice the earlier token.
    """
    match config.router.selection:
        case Selection.expert_choice:
            assert capacity is not None
            return _expert_choice(ranked_BSE, valid_BS, config, scopes, capacity)
        case Selection.sinkhorn if training:
            ranked_BSE = ranked_BSE + _sinkhorn_duals(ranked_BSE, valid_BS, config, scopes)
    if config.router.groups > 1:
        ranked_BSE = mask_other_groups(ranked_BSE, config.router)
    return ChosenExperts(top_k_ids(ranked_BSE, config.top_k))


def top_k_ids(ranked_BSE: Tensor, top_k: int) -> Tensor:
    """Ids of the K largest, largest first, NaN before all; of equal values the first, which torch.topk does not guarantee.

    A stable sort is two operators whatever K is; on a CPU it takes up to four times as long as K maxima.
    """
    return keep(partial(_top_k_ids, ranked_BSE, top_k))


def _top_k_ids(ranked_BSE: Tensor, top_k: int) -> Tensor:
    if kind_of(ranked_BSE) != "cpu":
        return ranked_BSE.sort(dim=-1, descending=True, stable=True).indices[..., :top_k].contiguous()
    remaining_BSE, chosen = ranked_BSE.clone(), []
    for _ in range(top_k):
        chosen.append(remaining_BSE.argmax(dim=-1, keepdim=True))
        remaining_BSE.scatter_(-1, chosen[-1], -torch.inf)
    return torch.cat(chosen, dim=-1)


def mask_other_groups(ranked_BSE: Tensor, router: RouterConfig) -> Tensor:
    """Sets experts outside each token's best groups to -inf (DeepSeek-V2, section 2.1.2; DeepSeek-V3 ranks by the best two)."""
    grouped = ranked_BSE.unflatten(-1, (router.groups, -1))
    ranked_by = 1 if router.group_score is GroupScore.max else 2
    groups = top_k_ids(grouped.topk(ranked_by, dim=-1).values.sum(dim=-1), router.top_groups)
    outside = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=grouped.device).scatter_(-1, groups, False)
    return grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)


def sample_second_expert(weights_BSK: Tensor, key_BS: Tensor) -> Tensor:
    """(B, S, 2): keeps the first expert, and the second with probability min(1, 2 x its share of the weights) (GShard, alg. 1)."""
    share_BS = weights_BSK[..., 1] / weights_BSK.sum(dim=-1)
    second_BS = random_uniform(key_BS, 1, Purpose.second_expert).squeeze(-1) < 2 * share_BS
    return torch.stack([torch.ones_like(second_BS), second_BS], dim=-1)


def _expert_choice(
    scores_BSE: Tensor, valid_BS: Tensor | None, config: MoEConfig, scopes: LocalScope, capacity: int
) -> ChosenExperts:
    """Each expert takes its best tokens of the scope (Zhou et al. 2022), so earlier tokens depend on later ones."""
    if valid_BS is not None:
        scores_BSE = scores_BSE.masked_fill(~valid_BS.unsqueeze(-1), -torch.inf)
    mask_BSE = best_of_scope(scores_BSE, capacity, config.capacity.scope, scopes, config.capacity.groups)
    return ChosenExperts(torch.arange(scores_BSE.shape[-1], device=scores_BSE.device).expand(scores_BSE.shape), mask_BSE)


def _sinkhorn_duals(logits_BSE: Tensor, valid_BS: Tensor | None, config: MoEConfig, scopes: LocalScope) -> Tensor:
    """(B or 1, 1, E): Sinkhorn's dual variables of the experts (S-BASE, Clark et al. 2022).

    Added to the logits, they give all experts an equal share of the scope. The duals of the tokens are left out, since they do not
    change a token's order of experts.
    """
    duals = logits_BSE.new_zeros(1, 1, logits_BSE.shape[-1])
    for _ in range(SINKHORN_ROUNDS):
        share_BSE = (logits_BSE + duals).softmax(dim=-1)
        if valid_BS is not None:
            share_BSE = share_BSE * valid_BS.unsqueeze(-1)
        load = scopes.total(share_BSE.sum(dim=1), config.balance.scope).unsqueeze(1)
        load = load.clamp(min=torch.finfo(load.dtype).tiny)
        duals = duals + load.mean(dim=-1, keepdim=True).log() - load.log()
    return duals
