"""Rules between the settings of the model, its routers included."""

import math
from collections.abc import Iterator
from operator import attrgetter

from ....moe.config import (
    AttentionKind,
    DropPolicy,
    GroupScore,
    ModelConfig,
    MoEConfig,
    QKNorm,
    RopeConfig,
    RopeScaling,
    Scope,
    Score,
    Selection,
)
from ....moe.param_shapes import head_width, rotary_width
from ..config import Config
from ..schema import written
from .rule import Violation, divisors, multiples, valid_pairs


def model(config: Config, world: int) -> Iterator[Violation]:
    c = config.model
    if c.dense_first > c.layers:
        yield Violation("model.dense_first", f"must be at most model.layers={c.layers}", [c.layers])
    listed_layers = ("dense_layers", "attention.full_layers", "attention.linear_layers")
    for key, listed in ((key, attrgetter(key)(c)) for key in listed_layers):
        if (valid := sorted({index for index in listed if 0 <= index < c.layers})) != listed:
            yield Violation(f"model.{key}", f"must be rising indices of the {c.layers} layers, from 0", [valid])
    if not c.pre_norms and not c.sandwich_norms:
        yield Violation("model.sandwich_norms", "must be true with model.pre_norms=false, or nothing is normed", [True])
    if c.mtp_depth >= config.sequence_length:
        rule = f"must be below sequence_length={config.sequence_length}, or nothing is left to predict"
        yield Violation("model.mtp_depth", rule, [config.sequence_length - 1])


def attention(config: Config, world: int) -> Iterator[Violation]:
    if config.optimizer.qk_clip is not None and config.model.attention.qk_norm is not QKNorm.none:
        norm = config.model.attention.qk_norm.value
        rule = f"must be null with model.attention.qk_norm={norm}, which undoes any factor of queries and keys"
        yield Violation("optimizer.qk_clip", rule, [None])
    kind, rope = config.model.attention.kind, config.model.attention.rope
    yield from (_latent if kind is AttentionKind.mla else _grouped_query)(config.model)
    if linear_blocks(config.model):
        keys, values = config.model.attention.delta.key_heads, config.model.attention.delta.value_heads
        if values % keys:
            rule = f"must be a multiple of model.attention.delta.key_heads={keys}"
            yield Violation("model.attention.delta.value_heads", rule, multiples(keys, values))
    if rope.scaling is RopeScaling.llama3 and rope.high_frequency_factor <= rope.low_frequency_factor:
        rule = f"must be above model.attention.rope.low_frequency_factor={rope.low_frequency_factor:g}"
        yield Violation("model.attention.rope.high_frequency_factor", rule, [rope.low_frequency_factor * 4])
    if rope.scaling is RopeScaling.yarn and rope.beta_fast < rope.beta_slow:
        rule = f"must be at least model.attention.rope.beta_slow={rope.beta_slow:g}"
        yield Violation("model.attention.rope.beta_fast", rule, [rope.beta_slow])
    if rope.scaling is RopeScaling.longrope:
        yield from _longrope(rope, rotary_width(config.model) // 2)
    if rope.scaling is RopeScaling.dynamic and rotary_width(config.model) < 4:
        rule = "dynamic needs two rotated pairs of a head"
        yield Violation("model.attention.rope.scaling", rule, [RopeScaling.linear])


def _longrope(rope: RopeConfig, pairs: int) -> Iterator[Violation]:
    if rope.original_length == 1:
        yield Violation("model.attention.rope.original_length", "must be at least 2 with longrope", [2])
    for name in ("short_factors", "long_factors"):
        factors = getattr(rope, name)
        if len(factors) != pairs or not all(0 < factor < math.inf for factor in factors):
            rule = f"must be {pairs} numbers above 0, one for each rotated pair of a head"
            yield Violation(f"model.attention.rope.{name}", rule, [[1.0] * pairs])


def _grouped_query(c: ModelConfig) -> Iterator[Violation]:
    fraction = c.attention.rope.fraction
    if c.heads % c.kv_heads:
        yield Violation("model.kv_heads", f"must divide model.heads={c.heads}", divisors(c.heads))
    if c.head_width is None and c.width % c.heads:
        yield Violation("model.heads", f"must divide model.width={c.width}", divisors(c.width))
    if fraction == 1 and c.head_width is None and c.width // c.heads % 2:
        yield Violation(
            "model.heads", f"must divide model.width={c.width} into even heads, rotation takes pairs", divisors(c.width)
        )
    if fraction == 1 and c.head_width is not None and c.head_width % 2:
        yield Violation("model.head_width", "must be even, rotary embeddings take pairs", multiples(2, c.head_width))
    width = head_width(c)
    if abs(fraction * width / 2 - round(fraction * width / 2)) > 1e-9:
        rule = f"must be an even share of the {width} dimensions of a head, rotation takes pairs"
        yield Violation("model.attention.rope.fraction", rule, [pairs * 2 / width for pairs in range(1, width // 2 + 1)])


def _latent(c: ModelConfig) -> Iterator[Violation]:
    """Settings that multi-head latent attention does not support, and the width of its rotary part."""
    a = c.attention
    if a.mla.rope_width % 2:
        yield Violation(
            "model.attention.mla.rope_width", "must be even, rotary embeddings take pairs", multiples(2, a.mla.rope_width)
        )
    left_out = ("rope.fraction", 1.0), ("qk_norm", QKNorm.none), ("qkv_bias", False), ("output_bias", False), ("sinks", False)
    linear = ("output_gate", False), ("linear_every", 1), ("linear_layers", [])
    for name, value in (*left_out, *linear, ("clip_qkv", None)):
        if attrgetter(name)(a) != value:
            yield Violation(
                f"model.attention.{name}", f"must be {written(value).removesuffix('.0')} with model.attention.kind=mla", [value]
            )


def linear_blocks(c: ModelConfig) -> int:
    """Blocks with gated DeltaNet instead of attention."""
    return sum(c.linear_layer(index) for index in range(c.layers))


def experts(config: Config, world: int) -> Iterator[Violation]:
    model, c = config.model, config.model.moe
    if not moe_blocks(model):
        return
    if c.top_k > c.experts:
        yield Violation("model.moe.top_k", f"must be at most model.moe.experts={c.experts}", [c.experts])
    if c.shortcut and model.moe_layer(0):
        rule = "must be at least 1 with model.moe.shortcut=true, whose experts take the input of the layer before"
        yield Violation("model.dense_first", rule, [1])
    if c.shortcut and any(model.moe_layer(model.layers + index) for index in range(model.mtp_depth)):
        yield Violation(
            "model.mtp_depth", "must be 0 with model.moe.shortcut=true, or its modules have experts, and no layer before", [0]
        )


def moe_blocks(c: ModelConfig) -> int:
    """Blocks with experts, those of multi-token prediction included."""
    return sum(c.moe_layer(index) for index in range(c.layers + c.mtp_depth))


# Rules between the settings of routers, balance losses and capacity. A model without experts breaks none.

ROUTER, BALANCE, CAPACITY = "model.moe.router", "model.moe.balance", "model.moe.capacity"


def routers(config: Config, world: int) -> Iterator[Violation]:
    c = config.model.moe
    if not any(config.model.moe_layer(index) for index in range(config.model.layers)):
        return
    yield from _null_experts(c)
    yield from _groups(c)
    yield from _selection(c)
    yield from _softmax_after_top_k(c)
    yield from _schedules(c)
    yield from _capacity(c)


def _null_experts(c: MoEConfig) -> Iterator[Violation]:
    router = c.router
    if router.selection is Selection.gshard and (router.copy_experts or router.constant_experts):
        name = "copy_experts" if router.copy_experts else "constant_experts"
        yield Violation(f"{ROUTER}.{name}", f"must be 0 with {ROUTER}.selection=gshard, which may drop a choice of one", [0])
    for name, other in (("copy_experts", "constant_experts"), ("constant_experts", "copy_experts")):
        room = router.null_experts - getattr(router, other)
        if getattr(router, name) > max(0, room):
            rule = f"must be at most {ROUTER}.null_experts={router.null_experts} together with {ROUTER}.{other}"
            yield Violation(f"{ROUTER}.{name}", rule, [max(0, room)])
            return


def _groups(c: MoEConfig) -> Iterator[Violation]:
    router, key = c.router, f"{ROUTER}.groups"
    if c.experts % router.groups:
        divisors = [groups for groups in range(1, c.experts + 1) if c.experts % groups == 0]
        yield Violation(key, f"must divide model.moe.experts={c.experts}", divisors)
        return
    size = c.experts // router.groups
    if router.top_groups > router.groups:
        yield Violation(f"{ROUTER}.top_groups", f"must be at most {key}={router.groups}", [router.groups])
    if router.groups == 1:
        for name in ("device_coefficient", "communication_coefficient"):
            if getattr(c.balance, name):
                yield Violation(f"{BALANCE}.{name}", f"must be 0 with {key}=1, its devices are these groups of experts", [0.0])
        return
    if c.top_k > size * router.top_groups:
        rule = (
            f"must be at most {size * router.top_groups}, the experts of {ROUTER}.top_groups={router.top_groups} groups of {size}"
        )
        yield Violation("model.moe.top_k", rule, [size * router.top_groups])
    if router.group_score is GroupScore.top2 and size < 2:
        yield Violation(f"{ROUTER}.group_score", "top2 needs groups of two experts or more", [GroupScore.max])
    if router.null_experts:
        yield Violation(f"{ROUTER}.null_experts", f"must be 0, null experts are in no group of {key}={router.groups}", [0])


def _selection(c: MoEConfig) -> Iterator[Violation]:
    router, chosen = c.router, c.router.selection
    chosen_by = f"with {ROUTER}.selection={chosen.value}"
    if chosen is Selection.gshard and c.top_k != 2:
        yield Violation("model.moe.top_k", f"must be 2 {chosen_by}", [2])
    if chosen is Selection.gshard and c.capacity.policy in (DropPolicy.probability, DropPolicy.random):
        rule = f"must be position or priority {chosen_by}, which places all first choices first"
        yield Violation(f"{CAPACITY}.policy", rule, [DropPolicy.position, DropPolicy.priority])
    if chosen not in (Selection.top_k, Selection.gshard):
        if router.groups > 1:
            yield Violation(f"{ROUTER}.groups", f"must be 1 {chosen_by}", [1])
        if c.balance.bias_rate > 0:
            yield Violation(f"{BALANCE}.bias_rate", f"must be 0 {chosen_by}, which no bias balances", [0.0])
    if chosen is Selection.hash:
        for name, off in (("bias", False), ("noise", False), ("jitter", 0.0)):
            if getattr(router, name) != off:
                yield Violation(f"{ROUTER}.{name}", f"must be {written(off)} {chosen_by}, which has no logits", [off])
        if c.balance.pool_layers:
            yield Violation(f"{BALANCE}.pool_layers", f"must be false {chosen_by}, which has no logits", [False])
    if chosen is Selection.expert_choice:
        if router.null_experts:
            yield Violation(f"{ROUTER}.null_experts", f"must be 0 {chosen_by}, every expert takes its share", [0])
        if c.capacity.scope is Scope.rank:
            scopes = [Scope.sequence, Scope.batch]
            yield Violation(f"{CAPACITY}.scope", f"must be sequence or batch {chosen_by}", scopes)


def _softmax_after_top_k(c: MoEConfig) -> Iterator[Violation]:
    router, key = c.router, f"{ROUTER}.softmax_after_top_k"
    if not router.softmax_after_top_k:
        return
    if router.score is not Score.softmax:
        yield Violation(f"{ROUTER}.score", f"must be softmax with {key}=true", [Score.softmax])
    if router.selection in (Selection.hash, Selection.expert_choice):
        yield Violation(key, f"must be false with {ROUTER}.selection={router.selection.value}", [False])
    if c.top_k == 1:
        yield Violation(key, "must be false with model.moe.top_k=1, whose weight would always be 1", [False])


def _capacity(c: MoEConfig) -> Iterator[Violation]:
    limits = c.capacity
    if limits.groups > 1 and limits.scope is not Scope.batch:
        yield Violation(
            f"{CAPACITY}.groups", f"must be 1 with {CAPACITY}.scope={limits.scope.value}, groups are parts of a batch", [1]
        )
    if c.router.selection is Selection.expert_choice and 0 in limits.schedule[1::2]:
        yield Violation(
            f"{CAPACITY}.schedule", "may not be dropless (0) with expert_choice, whose experts take what the factor says", [[]]
        )
    if limits.pad and limits.factor is None and not limits.schedule and c.router.selection is not Selection.expert_choice:
        yield Violation(f"{CAPACITY}.pad", f"must be false without {CAPACITY}.factor, there is nothing to pad to", [False])


def _schedules(c: MoEConfig) -> Iterator[Violation]:
    schedules = {
        f"{CAPACITY}.schedule": c.capacity.schedule,
        f"{BALANCE}.schedule": c.balance.schedule,
        f"{BALANCE}.bias_schedule": c.balance.bias_schedule,
        "model.moe.z_schedule": c.z_schedule,
    }
    for key, pairs in schedules.items():
        right = valid_pairs(pairs, lambda step, factor: step >= 0 and step == int(step) and 0 <= factor < math.inf)
        if pairs != right:
            yield Violation(key, "must be pairs of a rising step and a factor >= 0", [right])
