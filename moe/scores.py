"""From token vectors to logits, scores and the weights of the chosen experts, in fp32 or wider.

B sequences, S tokens of each, D width, E router columns (experts, then null experts), K chosen experts per token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import MoEConfig, RouterConfig, Score, Selection
from .noise import Purpose, fold, normal, uniform
from .products import wide_linear
from .tokens import Tokens

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


def hash_scores(tokens: Tokens, columns: int, top_k: int, dtype: torch.dtype) -> Tensor:
    """1 for the K experts of each token's id and 0 for the others (Hash Layers, Roller et al. 2021), another table in each layer.

    Every run of E ids, from a multiple of E on, meets each expert equally often.
    """
    assert tokens.ids_BS is not None, "hash selection needs the token ids"
    run_BS, place_BS = tokens.ids_BS // columns, tokens.ids_BS % columns
    order_BSE = uniform(fold(run_BS, tokens.layer), columns, Purpose.hash).argsort(dim=-1)
    distance_BSE = (order_BSE.argsort(dim=-1) - place_BS.unsqueeze(-1)) % columns
    return (distance_BSE < top_k).to(dtype)


def probabilities(scores_BSE: Tensor, router: RouterConfig) -> Tensor:
    """Scores that sum to one over the experts (DeepSeek-V3, eq. 19), which balance losses take."""
    if router.score is Score.softmax and router.selection is not Selection.hash:
        return scores_BSE
    return scores_BSE / (scores_BSE.sum(dim=-1, keepdim=True) + TINY)


def weigh(logits_BSE: Tensor | None, scores_BSE: Tensor, experts_BSK: Tensor, config: MoEConfig) -> Tensor:
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
