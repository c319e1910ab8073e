"""A model in words: how its tokens find their experts. No torch."""

from collections.abc import Iterator

from .config import ModelConfig, Score, Selection


def describe_routing(config: ModelConfig) -> str:
    """As in: top-8 of 256 from 4 of 8 groups, sigmoid scores, normalized, x 2.5, shared expert of 2048, balance by expert bias."""
    return ", ".join(_words(config)) if moe_layers(config) else "dense"


def moe_layers(config: ModelConfig) -> int:
    """How many layers have experts."""
    return sum(config.moe_layer(index) for index in range(config.layers))


def _words(config: ModelConfig) -> Iterator[str]:
    moe, router = config.moe, config.moe.router
    groups = f" from {router.top_groups} of {router.groups} groups" if router.groups > 1 else ""
    yield _selection(config) + groups
    if router.selection is not Selection.hash:
        yield f"{router.score.name} of the chosen" if router.softmax_after_top_k else _score(router.score)
        if router.normalize_top_k and moe.top_k > 1 and not router.softmax_after_top_k:
            yield "normalized"
    if router.scale != 1:
        yield f"x {router.scale:g}"
    if router.null_experts:
        yield f"{router.null_experts} more compute nothing"
    if moe.shared_hidden:
        yield f"{'gated ' * moe.shared_gate}shared expert of {moe.shared_hidden}"
    if moe.balance.bias_rate:
        yield "balance by expert bias"
    if moe.capacity.factor is not None:
        yield f"capacity {moe.capacity.factor:g}"


def _selection(config: ModelConfig) -> str:
    K, E = config.moe.top_k, config.moe.experts
    match config.moe.router.selection:
        case Selection.top_k:
            return f"top-{K} of {E}"
        case Selection.gshard:
            return f"top-{K} of {E}, the second at random"
        case Selection.expert_choice:
            return f"expert choice, {K} of {E} on average"
        case Selection.hash:
            return f"{K} of {E} by a hash of the token"
        case Selection.sinkhorn:
            return f"balanced top-{K} of {E} (sinkhorn)"


def _score(score: Score) -> str:
    return "softmax" if score is Score.softmax else f"{score.name} scores"
