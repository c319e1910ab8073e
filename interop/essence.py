"""What of a ModelConfig decides the function of the trained model: two that agree in it compute the same from the same weights."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from ..moe.config import AttentionKind, ModelConfig, RopeScaling

TRAINING = (
    "model.mtp_coefficient",
    "model.moe.balance.",
    "model.moe.z_coefficient",
    "model.moe.capacity.factor",
    "model.moe.capacity.minimum",
    "model.moe.capacity.scope",
    "model.moe.capacity.policy",
    "model.moe.capacity.pad",
    "model.moe.capacity.schedule",
    "model.moe.router.jitter",
)
"""Settings of training alone."""

ROPE = {
    RopeScaling.none: (),
    RopeScaling.linear: ("factor",),
    RopeScaling.yarn: (
        "factor",
        "original_length",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all",
        "truncate",
    ),
    RopeScaling.llama3: ("factor", "original_length", "low_frequency_factor", "high_frequency_factor"),
}
"""The settings of rope that each scaling uses, besides theta, fraction and interleaved."""


def essence(config: ModelConfig) -> dict[str, Any]:
    """By setting. Left out: what only training uses, and what has no effect beside the others."""
    idle = tuple(f"model.{name}" for name in _idle(config))
    found = {key: value for key, value in _leaves(config, "model") if not key.startswith(TRAINING + idle)}
    if config.attention.kind is AttentionKind.gqa:
        found["model.head_width"] = config.head_width or config.width // config.heads
    layers = range(config.layers)
    # Said in layers, as different settings may mean the same ones.
    found["model.moe_every"] = [index for index in layers if config.moe_layer(index)]
    if config.attention.window is not None:
        found["model.attention.window_every"] = [index for index in layers if config.windowed_layer(index)]
    # The rate is of training, but with it the router has a bias.
    found["model.moe.balance.bias_rate"] = bool(found["model.moe_every"]) and config.moe.balance.bias_rate > 0
    return found


def differences(wanted: ModelConfig, expressed: ModelConfig) -> dict[str, Any]:
    """The settings of `wanted` that `expressed` does not have, with their values."""
    ours, theirs = essence(wanted), essence(expressed)
    return {key: ours.get(key) for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)}


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    for field in fields(node):
        value, inside = getattr(node, field.name), f"{key}.{field.name}"
        yield from _leaves(value, inside) if is_dataclass(value) else [(inside, value)]


def _idle(config: ModelConfig) -> Iterator[str]:
    """Settings (or the beginnings of their names) without effect beside the others."""
    moe, router, attention = config.moe, config.moe.router, config.attention
    sparse = sum(config.moe_layer(index) for index in range(config.layers))
    yield from ("dense_first", "moe_every")
    if not sparse:
        yield "moe."
    if sparse == config.layers:
        yield "hidden"
        if not moe.shared_hidden:
            yield "activation"
    if not moe.shared_hidden:
        yield "moe.shared_gate"
    if router.groups == 1:
        yield from ("moe.router.top_groups", "moe.router.group_score")
    if router.softmax_after_top_k or moe.top_k == 1:
        yield "moe.router.normalize_top_k"
    yield from ("kv_heads", "head_width") if attention.kind is AttentionKind.mla else ("attention.mla.",)
    if attention.window is None:
        yield "attention.window_every"
    rope = attention.rope
    used = ("theta", "fraction", "interleaved", "scaling", *ROPE[rope.scaling])
    yield from (f"attention.rope.{field.name}" for field in fields(rope) if field.name not in used)
