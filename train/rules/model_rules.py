"""Rules between the settings of the model, but for those of its routers."""

from collections.abc import Iterator
from operator import attrgetter

from ...moe.config import AttentionKind, ModelConfig, QKNorm, RopeScaling
from ...moe.param_count import head_width
from ..config import Config
from .broken import Broken, divisors, multiples


def model(config: Config, world: int) -> Iterator[Broken]:
    c = config.model
    if moe_layers(c) and c.width % 8:
        yield Broken("model.width", "must be a multiple of 8, grouped products want rows of 16 bytes", multiples(8, c.width))
    if c.dense_first > c.layers:
        yield Broken("model.dense_first", f"must be at most model.layers={c.layers}", [c.layers])
    if c.mtp_depth >= config.sequence_length:
        rule = f"must be below sequence_length={config.sequence_length}, or nothing is left to predict"
        yield Broken("model.mtp_depth", rule, [config.sequence_length - 1])


def attention(config: Config, world: int) -> Iterator[Broken]:
    kind, rope = config.model.attention.kind, config.model.attention.rope
    yield from (_latent if kind is AttentionKind.mla else _grouped_query)(config.model)
    if rope.scaling is RopeScaling.llama3 and rope.high_frequency_factor <= rope.low_frequency_factor:
        rule = f"must be above model.attention.rope.low_frequency_factor={rope.low_frequency_factor:g}"
        yield Broken("model.attention.rope.high_frequency_factor", rule, [rope.low_frequency_factor * 4])
    if rope.scaling is RopeScaling.yarn and rope.beta_fast < rope.beta_slow:
        rule = f"must be at least model.attention.rope.beta_slow={rope.beta_slow:g}"
        yield Broken("model.attention.rope.beta_fast", rule, [rope.beta_slow])


def _grouped_query(c: ModelConfig) -> Iterator[Broken]:
    fraction = c.attention.rope.fraction
    if c.heads % c.kv_heads:
        yield Broken("model.kv_heads", f"must divide model.heads={c.heads}", divisors(c.heads))
    if c.head_width is None and c.width % c.heads:
        yield Broken("model.heads", f"must divide model.width={c.width}", divisors(c.width))
    if fraction == 1 and c.head_width is None and c.width // c.heads % 2:
        yield Broken("model.heads", f"must divide model.width={c.width} into even heads, rotation takes pairs", divisors(c.width))
    if fraction == 1 and c.head_width is not None and c.head_width % 2:
        yield Broken("model.head_width", "must be even, rotary embeddings take pairs", multiples(2, c.head_width))
    width = head_width(c)
    if abs(fraction * width / 2 - round(fraction * width / 2)) > 1e-9:
        rule = f"must be an even share of the {width} dimensions of a head, rotation takes pairs"
        yield Broken("model.attention.rope.fraction", rule, [pairs * 2 / width for pairs in range(1, width // 2 + 1)])


def _latent(c: ModelConfig) -> Iterator[Broken]:
    """What multi-head latent attention has no place for, and its rotary part."""
    a = c.attention
    if a.mla.rope_width % 2:
        yield Broken("model.attention.mla.rope_width", "must be even, rotary embeddings take pairs", multiples(2, a.mla.rope_width))
    left_out = ("rope.fraction", 1.0), ("qk_norm", QKNorm.none), ("qkv_bias", False), ("output_bias", False), ("sinks", False)
    for name, value in left_out:
        if attrgetter(name)(a) != value:
            text = value.value if isinstance(value, QKNorm) else str(value).lower().removesuffix(".0")
            yield Broken(f"model.attention.{name}", f"must be {text} with model.attention.kind=mla", [value])


def experts(config: Config, world: int) -> Iterator[Broken]:
    c = config.model.moe
    if not moe_layers(config.model):
        return
    if c.top_k > c.experts:
        yield Broken("model.moe.top_k", f"must be at most model.moe.experts={c.experts}", [c.experts])
    if c.hidden % 8:
        yield Broken("model.moe.hidden", "must be a multiple of 8, grouped products want rows of 16 bytes", multiples(8, c.hidden))


def moe_layers(c: ModelConfig) -> int:
    """How many blocks have experts, those of multi-token prediction included."""
    return sum(c.moe_layer(index) for index in range(c.layers + c.mtp_depth))
