"""The router: from tokens to the experts of each, their weights, and statistics.

B sequences, S tokens of each, T = B * S tokens, D width, E router columns (experts, then null experts), K chosen per token.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .balance import GroupSums, PooledSums, count_groups, group_sums
from .capacity import (
    LocalScope,
    capacity,
    count_choices,
    group_size,
    keep_best,
    keep_by_priority,
    keep_earliest,
    max_rows,
)
from .config import BalanceConfig, DropPolicy, MoEConfig, Scope, Score, Selection
from .device import uses_kernels
from .kernel_router import KernelRouting, is_covered, route
from .null_experts import NullExperts
from .router_metrics import RouterMetrics, compute_router_metrics
from .scoring import (
    ChosenExperts,
    NoisyLogits,
    add_noise,
    apply_jitter,
    choose_experts,
    gate_weights,
    hash_scores,
    normalize_scores,
    router_logits,
    sample_second_expert,
    selection_probability,
    to_scores,
    top_k_ids,
)
from .token_info import Purpose, TokenInfo, layer_keys, random_uniform

log = logging.getLogger("tokenyard")


class RoutingStats(NamedTuple):
    """Statistics of one MoE layer over the valid tokens of this device. They are sums, so that ranks can add up theirs."""

    counts_BE: Tensor
    """int64: tokens of each sequence that chose each column, null experts and dropped choices included.

    Sums to valid tokens x K; in expert choice, to the tokens that the experts took.
    """
    tokens_B: Tensor
    """int64: valid tokens of each sequence."""
    scores_BE: Tensor
    """Sum over each sequence's tokens of the router's probabilities; differentiable if a balance loss is on."""
    z: Tensor
    """Scalar: sum over tokens of logsumexp(logits) ** 2; differentiable if the z-loss is on."""
    dropped: Tensor
    """int64 scalar: choices dropped because their expert was full."""
    importance_BE: Tensor | None = None
    """Sum of the gate weights of each expert, differentiable; None if balance.importance_coefficient is 0."""
    load_BE: Tensor | None = None
    """Sum of the selection probabilities under learned noise, differentiable; without noise the counts."""
    router_metrics: RouterMetrics | None = None
    """Only in training, and only if the router `collects_metrics`."""
    first_BE: Tensor | None = None
    """int64: the first choices of each column, which GShard's balance loss counts; None in other selections."""
    group_sums: GroupSums | None = None
    """Only in gshard with capacity.groups > 1 and a balance loss over the batch, which is then one over each group."""
    pooled: PooledSums | None = None
    """Only with balance.pool_layers."""
    best_BE: Tensor | None = None
    """int64: the K best scores of each token, for balance.sequence_by_scores; None if it is off."""
    sent_BG: Tensor | None = None
    """int64: tokens sent to each group of experts, for DeepSeek-V2's communication balance loss; None if it is off."""
    overflow: Tensor | None = None
    """int64 scalar: choices, of padding tokens too, that the exchange had no room for; None if it has room for all."""


class Routing(NamedTuple):
    """The experts of each token and the weights of their outputs."""

    experts_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor | None
    """False for choices that are not dispatched: of a full expert, of a null expert, or not chosen after all; None: all are."""
    stats: RoutingStats
    padded_rows: int | None = None
    """Rows that each expert gets from this device, padding included; None: as many as chose it."""
    keys_T: Tensor | None = None
    """int64: the random keys of the tokens in this layer, for dropout inside of the experts; None if there is none."""


class Scored(NamedTuple):
    """What experts are chosen by. Hash selection has no logits; `noise` is there with learned noise only."""

    logits_BSE: Tensor | None
    scores_BSE: Tensor
    noise: NoisyLogits | None = None


class Router(nn.Module):
    """A linear projection to one logit per expert, in fp32 or wider whatever the dtype of x, and a choice by the logits."""

    def __init__(self, width: int, config: MoEConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.columns = config.experts + config.router.null_experts
        hashed = config.router.selection is Selection.hash  # nothing to learn
        self.weight = None if hashed else nn.Parameter(torch.empty(self.columns, width, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.columns, dtype=dtype)) if config.router.bias else None
        self.noise_weight = nn.Parameter(torch.empty(self.columns, width, dtype=dtype)) if config.router.noise else None
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", None)
        if config.balance.bias_rate > 0:
            self.add_expert_bias()
        returning = config.router.copy_experts or config.router.constant_experts
        self.null = NullExperts(width, config, dtype) if returning else None
        self.scopes = LocalScope()
        self.is_random = is_random(config)
        self.collects_metrics = False

    def extra_repr(self) -> str:
        router = self.config.router
        chosen = f"top_k={self.config.top_k}, {router.score.value}"
        chosen = chosen if router.selection is Selection.top_k else f"{chosen}, {router.selection.value}"
        return f"{self.columns} columns, {chosen}" if self.weight is None else f"{self.weight.shape[1]} -> {self.columns}, {chosen}"

    def add_expert_bias(self) -> None:
        """Adds the bias of auxiliary-loss-free balancing (DeepSeek-V3), always in fp32. It affects the choice, not the weights."""
        assert self.weight is not None
        self.register_buffer("expert_bias", torch.zeros(self.columns, dtype=torch.float32, device=self.weight.device))

    def forward(self, x_BSD: Tensor, tokens: TokenInfo | None = None) -> Routing:
        """Routes (B, S, D). Tokens that are not valid are not counted and take no capacity."""
        tokens = tokens or TokenInfo()
        key_BS = layer_keys(x_BSD, tokens) if self.training and self.is_random else None
        rows = self._capacity(x_BSD, tokens)
        logits_BSE, noise = self._logits(x_BSD, key_BS)
        if logits_BSE is not None and uses_kernels(logits_BSE) and noise is None and is_covered(self.config, rows is not None):
            routed = route(logits_BSE, self.expert_bias, tokens.valid_BS, self.config)
            chosen, weights_BSK = ChosenExperts(routed.experts_BSK), routed.weights_BSK
            kept_BSK, dropped = self._drop(chosen, weights_BSK, None, tokens, key_BS, rows)
            stats = self._stats_of_kernels(routed, logits_BSE, tokens, dropped)
        else:
            scored = self._score(logits_BSE, noise, x_BSD, tokens)
            chosen = choose_experts(self._ranked(scored), tokens.valid_BS, self.config, self.scopes, self.training, rows)
            weights_BSK = gate_weights(logits_BSE, scored.scores_BSE, chosen.experts_BSK, self.config)
            kept_BSK, dropped = self._drop(chosen, weights_BSK, scored.scores_BSE.detach(), tokens, key_BS, rows)
            stats = self._stats(chosen, weights_BSK, scored, tokens, dropped)
        kept_TK = None if kept_BSK is None else kept_BSK.flatten(0, 1)
        padded = None
        if self.config.capacity.pad and rows is not None:
            padded = max_rows(rows, x_BSD.shape[0], x_BSD.shape[1], self.config.capacity)
        return Routing(chosen.experts_BSK.flatten(0, 1), weights_BSK.flatten(0, 1), kept_TK, stats, padded)

    def _capacity(self, x_BSD: Tensor, tokens: TokenInfo) -> int | None:
        """Returns the rows that each expert takes of a scope or group; None is dropless, which expert choice never is."""
        config = self.config
        factor = config.capacity.factor_at(tokens.step) if self.training else config.capacity.evaluation_factor
        if config.router.selection is Selection.expert_choice:
            factor = factor or config.capacity.factor or 1.0
        if factor is None:
            return None
        in_scope = self.scopes.tokens(x_BSD.shape[0], x_BSD.shape[1], config.capacity.scope)
        return capacity(factor, group_size(in_scope, config.capacity.groups), config)

    def _logits(self, x_BSD: Tensor, key_BS: Tensor | None) -> tuple[Tensor | None, NoisyLogits | None]:
        router = self.config.router
        if self.weight is None:
            return None, None
        if router.jitter > 0 and key_BS is not None:
            x_BSD = apply_jitter(x_BSD.to(torch.promote_types(x_BSD.dtype, torch.float32)), key_BS, router.jitter)
        logits_BSE = router_logits(x_BSD, self.weight, self.bias)
        if self.noise_weight is None or key_BS is None:
            return logits_BSE, None
        noise = add_noise(logits_BSE, router_logits(x_BSD, self.noise_weight), key_BS)
        return noise.logits_BSE, noise

    def _score(self, logits_BSE: Tensor | None, noise: NoisyLogits | None, x_BSD: Tensor, tokens: TokenInfo) -> Scored:
        if logits_BSE is None:
            wide = torch.promote_types(x_BSD.dtype, torch.float32)
            return Scored(None, hash_scores(tokens, self.columns, self.config.top_k, wide))
        return Scored(logits_BSE, to_scores(logits_BSE, self.config.router.score), noise)

    def _ranked(self, scored: Scored) -> Tensor:
        router, ranked_BSE = self.config.router, scored.scores_BSE
        if router.softmax_after_top_k or router.selection is Selection.sinkhorn:
            assert scored.logits_BSE is not None
            ranked_BSE = scored.logits_BSE
        return ranked_BSE if self.expert_bias is None else ranked_BSE + self.expert_bias

    def _drop(
        self,
        chosen: ChosenExperts,
        weights_BSK: Tensor,
        scores_BSE: Tensor | None,
        tokens: TokenInfo,
        key_BS: Tensor | None,
        rows: int | None,
    ) -> tuple[Tensor | None, Tensor]:
        """Returns the mask of choices to dispatch (None: all), and how many were dropped for lack of capacity.

        As in algorithm 1 of GShard, a second choice takes a place of its expert whether or not it is drawn.
        """
        config, experts_BSK, wanted_BSK, drawn_BSK = self.config, chosen.experts_BSK, chosen.mask_BSK, None
        none = torch.zeros((), dtype=torch.int64, device=experts_BSK.device)
        if config.router.null_experts:
            wanted_BSK = experts_BSK < config.experts
        if config.router.selection is Selection.gshard and key_BS is not None:
            drawn_BSK = sample_second_expert(weights_BSK.detach(), key_BS)
        if rows is None or config.router.selection is Selection.expert_choice:
            return drawn_BSK if wanted_BSK is None else wanted_BSK if drawn_BSK is None else wanted_BSK & drawn_BSK, none
        if wanted_BSK is None:
            wanted_BSK = torch.ones_like(experts_BSK, dtype=torch.bool)
        if tokens.valid_BS is not None:
            wanted_BSK = wanted_BSK & tokens.valid_BS.unsqueeze(-1)
        kept_BSK = self._within_capacity(experts_BSK, wanted_BSK, scores_BSE, key_BS, rows)
        if drawn_BSK is not None:
            kept_BSK, wanted_BSK = kept_BSK & drawn_BSK, wanted_BSK & drawn_BSK
        return kept_BSK, wanted_BSK.sum() - kept_BSK.sum()

    def _within_capacity(
        self, experts_BSK: Tensor, wanted_BSK: Tensor, scores_BSE: Tensor | None, key_BS: Tensor | None, rows: int
    ) -> Tensor:
        """Outside training nothing is random: there the random policy drops by position."""
        limits, scopes = self.config.capacity, self.scopes
        match limits.policy:
            case DropPolicy.probability:
                assert scores_BSE is not None
                return keep_best(experts_BSK, wanted_BSK, scores_BSE, rows, limits.scope, scopes, limits.groups)
            case DropPolicy.random if key_BS is not None:
                drawn_BSE = random_uniform(key_BS, self.columns, Purpose.drop)
                return keep_best(experts_BSK, wanted_BSK, drawn_BSE, rows, limits.scope, scopes, limits.groups)
            case DropPolicy.priority:
                assert scores_BSE is not None
                best_BS = scores_BSE.gather(-1, experts_BSK).amax(-1)
                return keep_by_priority(experts_BSK, wanted_BSK, best_BS, rows, self.columns, limits.scope, scopes, limits.groups)
        firsts_first = self.config.router.selection is Selection.gshard
        return keep_earliest(experts_BSK, wanted_BSK, rows, self.columns, limits.scope, scopes, limits.groups, firsts_first)

    def _stats(
        self, chosen: ChosenExperts, weights_BSK: Tensor, scored: Scored, tokens: TokenInfo, dropped: Tensor
    ) -> RoutingStats:
        valid_BS = valid_tokens(tokens, weights_BSK)
        valid_BS1 = valid_BS.unsqueeze(-1)
        counted_BSK = valid_BS1 if chosen.mask_BSK is None else chosen.mask_BSK & valid_BS1
        counts_BE = count_choices(chosen.experts_BSK, counted_BSK, self.columns)
        balance, logits_BSE = self.config.balance, scored.logits_BSE
        scores_BSE = scored.scores_BSE if balances_scores(balance) else scored.scores_BSE.detach()
        probabilities_BSE = normalize_scores(scores_BSE, self.config.router)
        scores_BE = (probabilities_BSE * valid_BS1).sum(dim=1)
        if logits_BSE is not None and self.config.z_coefficient == 0:
            logits_BSE = logits_BSE.detach()
        z_BS = weights_BSK.new_zeros(()) if logits_BSE is None else logits_BSE.logsumexp(dim=-1).square()
        stats = RoutingStats(counts_BE, valid_BS.sum(dim=1), scores_BE, (z_BS * valid_BS).sum(), dropped)
        stats = self._with_counts(stats, chosen, valid_BS, scored, probabilities_BSE)
        if self.collects_metrics and self.training:
            metrics = compute_router_metrics(scored.logits_BSE, probabilities_BSE.detach(), valid_BS)
            stats = stats._replace(router_metrics=metrics)
        if self.config.balance.importance_coefficient == 0:
            return stats
        chosen_BA = chosen.experts_BSK.flatten(1)
        importance_BE = torch.zeros_like(scores_BE).scatter_add(1, chosen_BA, (weights_BSK * counted_BSK).flatten(1))
        load_BE = counts_BE.to(scores_BE.dtype)
        if scored.noise is not None and self._is_top_k_of_logits():
            load_BE = (selection_probability(scored.noise, self.config.top_k) * valid_BS1).sum(dim=1)
        return stats._replace(importance_BE=importance_BE, load_BE=load_BE)

    def _stats_of_kernels(self, routed: KernelRouting, logits_BSE: Tensor, tokens: TokenInfo, dropped: Tensor) -> RoutingStats:
        """See `_stats`. What the kernels do not compute is computed from the logits."""
        valid_BS, config = valid_tokens(tokens, routed.weights_BSK), self.config
        scores_BE = routed.scores_BE if balances_scores(config.balance) else routed.scores_BE.detach()
        z = routed.z if config.z_coefficient else routed.z.detach()
        stats = RoutingStats(routed.counts_BE, routed.tokens_B, scores_BE, z, dropped)
        if config.balance.sequence_coefficient and config.balance.sequence_by_scores:
            stats = stats._replace(best_BE=routed.best_BE)
        stats = self._with_choices(stats, routed.experts_BSK, valid_BS, logits_BSE)
        if self.collects_metrics and self.training:
            probabilities_BSE = normalize_scores(to_scores(logits_BSE.detach(), config.router.score), config.router)
            stats = stats._replace(router_metrics=compute_router_metrics(logits_BSE, probabilities_BSE, valid_BS))
        return stats

    def _with_counts(
        self, stats: RoutingStats, chosen: ChosenExperts, valid_BS: Tensor, scored: Scored, probabilities_BSE: Tensor
    ) -> RoutingStats:
        """Adds what the balance losses that are on count besides choices."""
        balance, groups, first_BS1 = self.config.balance, self.config.capacity.groups, chosen.experts_BSK[..., :1]
        if self.config.router.selection is Selection.gshard:
            stats = stats._replace(first_BE=count_choices(first_BS1, valid_BS.unsqueeze(-1), self.columns))
            if groups > 1 and balance.coefficient and balance.scope is Scope.batch:
                stats = stats._replace(group_sums=group_sums(first_BS1, valid_BS, probabilities_BSE, groups, self.scopes))
        if balance.sequence_coefficient and balance.sequence_by_scores:
            best_BSK = top_k_ids(scored.scores_BSE.detach(), self.config.top_k)
            stats = stats._replace(best_BE=count_choices(best_BSK, valid_BS.unsqueeze(-1), self.columns))
        return self._with_choices(stats, chosen.experts_BSK, valid_BS, scored.logits_BSE)

    def _with_choices(self, stats: RoutingStats, experts_BSK: Tensor, valid_BS: Tensor, logits_BSE: Tensor | None) -> RoutingStats:
        balance = self.config.balance
        if balance.pool_layers and logits_BSE is not None:
            logits_BSE = logits_BSE if balance.coefficient else logits_BSE.detach()
            stats = stats._replace(pooled=self._pooled_sums(stats, logits_BSE, valid_BS))
        if balance.communication_coefficient:
            sent_BG = count_groups(experts_BSK, valid_BS, self.columns, self.config.router.groups)
            stats = stats._replace(sent_BG=sent_BG)
        return stats

    def _pooled_sums(self, stats: RoutingStats, logits_BSE: Tensor, valid_BS: Tensor) -> PooledSums:
        if self.config.router.score is Score.softmax and self._is_top_k_of_logits():
            return PooledSums(stats.counts_BE, stats.scores_BE)
        softmax_BSE, valid_BS1 = logits_BSE.softmax(dim=-1), valid_BS.unsqueeze(-1)
        best_BSK = top_k_ids(softmax_BSE.detach(), self.config.top_k)
        return PooledSums(count_choices(best_BSK, valid_BS1, self.columns), (softmax_BSE * valid_BS1).sum(dim=1))

    def _is_top_k_of_logits(self) -> bool:
        """Whether the K < E largest logits are chosen, so that `selection_probability` holds."""
        router = self.config.router
        plain = router.selection in (Selection.top_k, Selection.gshard) and router.groups == 1 and self.expert_bias is None
        return plain and self.config.top_k < self.columns


def valid_tokens(tokens: TokenInfo, weights_BSK: Tensor) -> Tensor:
    """Booleans (B, S)."""
    if tokens.valid_BS is not None:
        return tokens.valid_BS
    return torch.ones(weights_BSK.shape[:2], dtype=torch.bool, device=weights_BSK.device)


def balances_scores(balance: BalanceConfig) -> bool:
    """Returns whether a loss depends on the sums of the scores; those that are off have no backward pass."""
    return any((balance.coefficient, balance.sequence_coefficient, balance.device_coefficient, balance.communication_coefficient))


def is_random(config: MoEConfig) -> bool:
    """Whether routing draws random numbers in training."""
    router, random_drops = config.router, config.capacity.policy is DropPolicy.random
    return router.jitter > 0 or router.noise or router.selection is Selection.gshard or random_drops


def warn_of_lookahead(config: MoEConfig) -> None:
    """Logs a warning if a token's experts depend on later tokens."""
    if config.experts and config.router.selection is Selection.expert_choice:
        log.warning("expert_choice looks ahead: whether an expert takes a token depends on later tokens, which generation has not")
