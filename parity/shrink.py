"""Makes a small model with all features of a large one, so that many layouts can be compared in seconds."""

import copy
import math

from ..moe.config import AttentionKind, GroupScore, ModelConfig, MoEConfig
from ..moe.param_shapes import head_width, rotary_width
from ..train.config.config import Config

LENGTH, VOCABULARY, WIDTH, HIDDEN = 32, 64, 32, 32
CLIP_NORM = 0.05
"""Small enough that gradients of these models are clipped."""


def shrink(config: Config, ranks: int, stages: int = 1) -> Config:
    """Returns `config` with few and narrow layers; sizes that degrees up to `ranks` divide stay divisible.

    Keeps dense first layers, every kind of layer, shared and null experts, groups, top-k (up to 8), grouped-query heads, windows,
    latents and multi-token prediction (up to 2), and layers for `stages` of a pipeline. The standard deviation of the weights
    grows as the width shrinks.
    """
    small = copy.deepcopy(config)
    m = small.model
    small.sequence_length = min(config.sequence_length, LENGTH)
    small.batch.sequences, small.batch.micro = 2 * ranks, None
    if small.optimizer.clip_norm is not None:
        small.optimizer.clip_norm = min(small.optimizer.clip_norm, CLIP_NORM)
    _shrink_depth(m, stages)
    _shrink_attention(m, ranks)
    m.hidden, m.vocabulary = min(m.hidden, HIDDEN), min(m.vocabulary, VOCABULARY)
    rope, pairs = m.attention.rope, rotary_width(m) // 2
    rope.short_factors, rope.long_factors = rope.short_factors[:pairs], rope.long_factors[:pairs]
    _shrink_experts(m.moe, ranks)
    m.init_std *= math.sqrt(config.model.width / m.width)
    return small


def _shrink_depth(m: ModelConfig, stages: int) -> None:
    m.mtp_depth = min(m.mtp_depth, 2)
    later = m.layers - m.dense_first
    m.dense_first = min(m.dense_first, 1)
    every = max(m.attention.linear_every, m.attention.window_every if m.attention.window else 1)
    m.layers = m.dense_first + min(later, max(2, m.moe_every, every, stages - 1 - m.dense_first))
    m.dense_layers, m.attention.full_layers = [], []  # with fewer layers, all of them may be listed
    if m.attention.linear_layers:
        m.attention.linear_layers = [index for index in m.attention.linear_layers if index < m.layers - 1] or [0]
    if m.moe.shortcut and m.moe_layer(0):
        m.dense_first, m.layers = 1, m.layers + 1


def _shrink_attention(m: ModelConfig, ranks: int) -> None:
    a, shared, wide, explicit = m.attention, m.heads // m.kv_heads, head_width(m), m.head_width is not None
    heads = math.gcd(m.kv_heads, ranks)
    m.kv_heads = heads if heads > 1 else min(m.kv_heads, 2)
    m.heads = m.kv_heads * min(shared, 2)
    if a.window is not None:
        a.window = min(a.window, LENGTH // 4)
    d, groups = a.delta, a.delta.value_heads // a.delta.key_heads
    unit = math.gcd(d.key_heads, ranks)
    d.key_heads = unit if unit > 1 else min(d.key_heads, 2)
    d.value_heads = d.key_heads * max(1, min(groups, 2))
    d.key_width, d.value_width = min(d.key_width, 8), min(d.value_width, 6)
    if a.kind is AttentionKind.mla:
        a.mla.q_rank = a.mla.q_rank and min(a.mla.q_rank, 12)
        a.mla.kv_rank, a.mla.value_width = min(a.mla.kv_rank, 12), min(a.mla.value_width, 8)
        a.mla.nope_width, a.mla.rope_width = min(a.mla.nope_width, 8), min(a.mla.rope_width, 4)
        m.width = min(m.width, WIDTH)
        return
    pairs = (width for width in range(min(8, wide), wide, 2) if (a.rope.fraction * width / 2).is_integer())
    wide = next(pairs, wide)
    if explicit:
        m.width, m.head_width = min(m.width, WIDTH), wide
    else:
        m.width = m.heads * wide


def _shrink_experts(c: MoEConfig, ranks: int) -> None:
    groups, top_groups, unit = c.router.groups, c.router.top_groups, math.gcd(c.experts, ranks)
    c.hidden, c.shared_hidden = min(c.hidden, HIDDEN), min(c.shared_hidden, HIDDEN)
    r, c.top_k = c.router, min(c.top_k, 8)
    zero = min(r.null_experts - r.copy_experts - r.constant_experts, 1 if r.copy_experts or r.constant_experts else 4)
    r.copy_experts, r.constant_experts = min(r.copy_experts, 2), min(r.constant_experts, 2)
    r.null_experts = zero + r.copy_experts + r.constant_experts
    least = max(8, 2 * c.top_k)
    size = 2 if groups > 1 or c.router.group_score is GroupScore.top2 else 1
    fitting = (
        experts
        for experts in range(least, c.experts)
        if experts % math.lcm(unit, groups) == 0 and experts >= size * groups and c.top_k <= experts // groups * top_groups
    )
    c.experts = next(fitting, c.experts)
