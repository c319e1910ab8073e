"""From tokens to their experts: score, choose, weigh, keep, count.

B sequences, S tokens of each, T = B * S tokens, D width, E router columns (experts, then null experts), K chosen per token.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .capacity import LocalScope, capacity, count_choices, keep_best, keep_earliest, most_rows
from .config import DropPolicy, MoEConfig, Selection
from .scoring import (
    Choice,
    Noisy,
    chance_of_choice,
    choose,
    gate_weights,
    hash_scores,
    jittered,
    noisy,
    probabilities,
    project,
    score,
    second_is_kept,
)
from .token_info import BatchPosition, Purpose, TokenInfo, fold_in, places, uniform

# What one layer's router and experts did with the valid tokens of this device, beside counts: numbers to watch, without
# gradient.
#
# B sequences, S tokens of each, E router columns.

SUMS = ("tokens", "entropy", "top1", "logit_norm", "rows")
"""The columns G of `RouterMetrics.sums`, in this order. They add up over micro-batches and ranks."""


class RouterMetrics(NamedTuple):
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
def gauge(logits_BSE: Tensor | None, probabilities_BSE: Tensor, valid_BS: Tensor) -> RouterMetrics:
    """Without the rows, which nobody knows before dispatch."""
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


log = logging.getLogger("tokenyard")


class RoutingStats(NamedTuple):
    """What one MoE layer's router did with the valid tokens of this device. Sums, so that ranks can add theirs."""

    counts_BE: Tensor
    """int64: tokens of each sequence that chose each column, null experts included, before any is dropped.

    Sums to valid tokens x K; in expert choice it is what the experts took.
    """
    tokens_B: Tensor
    """int64: valid tokens of each sequence."""
    scores_BE: Tensor
    """Sum over each sequence's tokens of the router's probabilities; carries the balance losses' gradient, if any is on."""
    z: Tensor
    """Scalar: sum over tokens of logsumexp(logits) ** 2; carries the z-loss's gradient, if it is on."""
    dropped: Tensor
    """int64 scalar: choices that found their expert full."""
    importance_BE: Tensor | None = None
    """Sum of the chosen experts' weights, with gradient; only where balance.importance_coefficient is on."""
    load_BE: Tensor | None = None
    """Sum of the probabilities to be chosen under learned noise, with gradient; else the counts."""
    router_metrics: RouterMetrics | None = None
    """Numbers to watch; only in training and only where the router `collects_metrics`."""


class Routing(NamedTuple):
    """Each token's experts and the weights of their outputs."""

    experts_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor | None
    """False where nothing is dispatched: the expert was full, is a null expert, or was not chosen after all; None: all are."""
    stats: RoutingStats
    padded_rows: int | None = None
    """Rows that each expert gets from this device, zeros included; None: as many as chose it."""


class Scored(NamedTuple):
    """What choices are made by. Hash selection has no logits, and only learned noise has `noise`."""

    logits_BSE: Tensor | None
    scores_BSE: Tensor
    noise: Noisy | None = None


class Router(nn.Module):
    """A linear projection to one logit per expert, in fp32 or wider whatever x is, and a choice by those."""

    def __init__(self, width: int, config: MoEConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.columns = config.experts + config.router.null_experts
        hashed = config.router.selection is Selection.hash  # it has nothing to learn
        self.weight = None if hashed else nn.Parameter(torch.empty(self.columns, width, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.columns, dtype=dtype)) if config.router.bias else None
        self.noise_weight = nn.Parameter(torch.empty(self.columns, width, dtype=dtype)) if config.router.noise else None
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", None)
        if config.balance.bias_rate > 0:
            self.add_expert_bias()
        self.surroundings = LocalScope()
        self.draws = draws(config)
        self.collects_metrics = False

    def add_expert_bias(self) -> None:
        """The auxiliary-loss-free bias (DeepSeek-V3): fp32 always, decides who is chosen and not how much they weigh."""
        assert self.weight is not None
        self.register_buffer("expert_bias", torch.zeros(self.columns, dtype=torch.float32, device=self.weight.device))

    def forward(self, x_BSD: Tensor, tokens: TokenInfo | None = None) -> Routing:
        """Route (B, S, D). Tokens that are not valid are not counted, and take no capacity."""
        tokens = tokens or TokenInfo()
        key_BS = self._key(x_BSD, tokens) if self.training and self.draws else None
        rows = self._capacity(x_BSD, tokens)
        scored = self._score(x_BSD, tokens, key_BS)
        choice = choose(self._ranked(scored), tokens.valid_BS, self.config, self.surroundings, self.training, rows)
        weights_BSK = gate_weights(scored.logits_BSE, scored.scores_BSE, choice.experts_BSK, self.config)
        kept_BSK, dropped = self._keep(choice, weights_BSK, scored, tokens, key_BS, rows)
        stats = self._count(choice, weights_BSK, scored, tokens, dropped)
        kept_TK = None if kept_BSK is None else kept_BSK.flatten(0, 1)
        padded = None
        if self.config.capacity.pad and rows is not None:
            padded = most_rows(rows, x_BSD.shape[0], x_BSD.shape[1], self.config.capacity.scope)
        return Routing(choice.experts_BSK.flatten(0, 1), weights_BSK.flatten(0, 1), kept_TK, stats, padded)

    def _key(self, x_BSD: Tensor, tokens: TokenInfo) -> Tensor:
        """int64 (B, S): the key of all randomness of these tokens in this layer. A router on its own sees the run's first rows."""
        place_BS = tokens.place_BS
        if place_BS is None:
            place_BS = places(BatchPosition(), x_BSD.shape[0], x_BSD.shape[1], x_BSD.device)
        return fold_in(place_BS, tokens.layer)

    def _capacity(self, x_BSD: Tensor, tokens: TokenInfo) -> int | None:
        """Rows that each expert takes of a scope; None is dropless. Expert choice needs one always."""
        config = self.config
        factor = config.capacity.factor_at(tokens.step) if self.training else config.capacity.evaluation_factor
        if config.router.selection is Selection.expert_choice:
            factor = factor or config.capacity.factor or 1.0
        if factor is None:
            return None
        return capacity(factor, self.surroundings.tokens(x_BSD.shape[0], x_BSD.shape[1], config.capacity.scope), config)

    def _score(self, x_BSD: Tensor, tokens: TokenInfo, key_BS: Tensor | None) -> Scored:
        router = self.config.router
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        if self.weight is None:
            return Scored(None, hash_scores(tokens, self.columns, self.config.top_k, wide))
        if router.jitter > 0 and key_BS is not None:
            x_BSD = jittered(x_BSD.to(wide), key_BS, router.jitter)
        logits_BSE, noise = project(x_BSD, self.weight, self.bias), None
        if self.noise_weight is not None and key_BS is not None:
            noise = noisy(logits_BSE, project(x_BSD, self.noise_weight), key_BS)
            logits_BSE = noise.logits_BSE
        return Scored(logits_BSE, score(logits_BSE, router.score), noise)

    def _ranked(self, scored: Scored) -> Tensor:
        router, ranked_BSE = self.config.router, scored.scores_BSE
        if router.softmax_after_top_k or router.selection is Selection.sinkhorn:
            assert scored.logits_BSE is not None
            ranked_BSE = scored.logits_BSE
        return ranked_BSE if self.expert_bias is None else ranked_BSE + self.expert_bias

    def _keep(
        self, choice: Choice, weights_BSK: Tensor, scored: Scored, tokens: TokenInfo, key_BS: Tensor | None, rows: int | None
    ) -> tuple[Tensor | None, Tensor]:
        """Which choices are dispatched (None: all), and how many were dropped for want of capacity."""
        config, experts_BSK, wanted_BSK = self.config, choice.experts_BSK, choice.made_BSK
        none = torch.zeros((), dtype=torch.int64, device=experts_BSK.device)
        if config.router.null_experts:
            wanted_BSK = experts_BSK < config.experts
        if config.router.selection is Selection.gshard and key_BS is not None:
            second_BSK = second_is_kept(weights_BSK.detach(), key_BS)
            wanted_BSK = second_BSK if wanted_BSK is None else wanted_BSK & second_BSK
        if rows is None or config.router.selection is Selection.expert_choice:
            return wanted_BSK, none
        if wanted_BSK is None:
            wanted_BSK = torch.ones_like(experts_BSK, dtype=torch.bool)
        if tokens.valid_BS is not None:
            wanted_BSK = wanted_BSK & tokens.valid_BS.unsqueeze(-1)
        kept_BSK = self._keep_within(experts_BSK, wanted_BSK, scored.scores_BSE.detach(), key_BS, rows)
        return kept_BSK, wanted_BSK.sum() - kept_BSK.sum()

    def _keep_within(self, experts_BSK: Tensor, wanted_BSK: Tensor, scores_BSE: Tensor, key_BS: Tensor | None, rows: int) -> Tensor:
        """Outside training nothing is random: there a random policy drops by position."""
        limits = self.config.capacity
        if limits.policy is DropPolicy.probability:
            return keep_best(experts_BSK, wanted_BSK, scores_BSE, rows, limits.scope, self.surroundings)
        if limits.policy is DropPolicy.random and key_BS is not None:
            drawn_BSE = uniform(key_BS, self.columns, Purpose.drop)
            return keep_best(experts_BSK, wanted_BSK, drawn_BSE, rows, limits.scope, self.surroundings)
        return keep_earliest(experts_BSK, wanted_BSK, rows, self.columns, limits.scope, self.surroundings)

    def _count(self, choice: Choice, weights_BSK: Tensor, scored: Scored, tokens: TokenInfo, dropped: Tensor) -> RoutingStats:
        valid_BS = tokens.valid_BS
        if valid_BS is None:
            valid_BS = torch.ones(weights_BSK.shape[:2], dtype=torch.bool, device=weights_BSK.device)
        valid_BS1 = valid_BS.unsqueeze(-1)
        counted_BSK = valid_BS1 if choice.made_BSK is None else choice.made_BSK & valid_BS1
        counts_BE = count_choices(choice.experts_BSK, counted_BSK, self.columns)
        balance, logits_BSE = self.config.balance, scored.logits_BSE
        # A loss that is off has no backward pass.
        balanced = balance.coefficient != 0 or balance.sequence_coefficient != 0
        probabilities_BSE = probabilities(scored.scores_BSE if balanced else scored.scores_BSE.detach(), self.config.router)
        scores_BE = (probabilities_BSE * valid_BS1).sum(dim=1)
        if logits_BSE is not None and self.config.z_coefficient == 0:
            logits_BSE = logits_BSE.detach()
        z_BS = weights_BSK.new_zeros(()) if logits_BSE is None else logits_BSE.logsumexp(dim=-1).square()
        stats = RoutingStats(counts_BE, valid_BS.sum(dim=1), scores_BE, (z_BS * valid_BS).sum(), dropped)
        if self.collects_metrics and self.training:
            stats = stats._replace(router_metrics=gauge(scored.logits_BSE, probabilities_BSE.detach(), valid_BS))
        if self.config.balance.importance_coefficient == 0:
            return stats
        chosen_BA = choice.experts_BSK.flatten(1)
        importance_BE = torch.zeros_like(scores_BE).scatter_add(1, chosen_BA, (weights_BSK * counted_BSK).flatten(1))
        load_BE = counts_BE.to(scores_BE.dtype)
        if scored.noise is not None and self._ranked_by_logits():
            load_BE = (chance_of_choice(scored.noise, self.config.top_k) * valid_BS1).sum(dim=1)
        return stats._replace(importance_BE=importance_BE, load_BE=load_BE)

    def _ranked_by_logits(self) -> bool:
        """Whether the K largest logits are chosen, so that the chance of it is known; and not simply all."""
        router = self.config.router
        plain = router.selection in (Selection.top_k, Selection.gshard) and router.groups == 1 and self.expert_bias is None
        return plain and self.config.top_k < self.columns


def draws(config: MoEConfig) -> bool:
    """Whether anything in training's routing is random."""
    router, random_drops = config.router, config.capacity.policy is DropPolicy.random
    return router.jitter > 0 or router.noise or router.selection is Selection.gshard or random_drops


def warn_of_lookahead(config: MoEConfig) -> None:
    """One line where a causal model would see later tokens."""
    if config.experts and config.router.selection is Selection.expert_choice:
        log.warning("expert_choice looks ahead: whether an expert takes a token depends on later tokens, which generation has not")
