"""The router's kernels: what they give, and for which routers.

B sequences, S tokens of each, E router columns, K chosen experts per token.
"""

from typing import NamedTuple

from torch import Tensor

from .config import DropPolicy, GroupScore, MoEConfig, Score, Selection
from .kernels import operators


class KernelRouting(NamedTuple):
    """The choice of experts, their weights, and the sums of `RoutingStats`."""

    experts_BSK: Tensor
    weights_BSK: Tensor
    counts_BE: Tensor
    tokens_B: Tensor
    scores_BE: Tensor
    z: Tensor
    best_BE: Tensor
    """Empty without balance.sequence_by_scores."""


def is_covered(config: MoEConfig, dropping: bool) -> bool:
    """Returns whether the kernels replace the router's other code: top-k of softmax or sigmoid, and nobody needs the scores.

    `dropping`: experts have a capacity.
    """
    router, balance = config.router, config.balance
    scores = Score.softmax, *(() if router.softmax_after_top_k else (Score.sigmoid,))
    drops = not dropping or config.capacity.policy in (DropPolicy.position, DropPolicy.random)
    few = config.experts + router.null_experts <= operators.MOST_EXPERTS
    return router.selection is Selection.top_k and router.score in scores and few and drops and not balance.importance_coefficient


def route(
    logits_BSE: Tensor, bias_E: Tensor | None, valid_BS: Tensor | None, config: MoEConfig, given_BSK: Tensor | None = None
) -> KernelRouting:
    """Chooses as `scoring.choose_experts`, or takes `given_BSK`, weights as `scoring.gate_weights`, and sums as `Router._stats`."""
    router, balance = config.router, config.balance
    normalize = router.normalize_top_k and (config.top_k > 1 or router.normalize_one)
    scores = router.score is Score.sigmoid, router.softmax_after_top_k, normalize, router.scale
    groups = router.groups, router.top_groups, router.group_score is GroupScore.top2
    counts_best = balance.sequence_coefficient > 0 and balance.sequence_by_scores
    return KernelRouting(*operators.route(logits_BSE, bias_E, valid_BS, given_BSK, config.top_k, *scores, *groups, counts_best))
