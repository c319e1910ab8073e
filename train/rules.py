"""Every rule that must hold between settings, and the values that may mend a broken one. Types and names are checked by compose."""

import math
from collections.abc import Callable, Iterator
from operator import attrgetter

from ..data.config import TokenizerKind
from ..moe.config import AttentionKind, ModelConfig, QKNorm, RopeScaling
from ..moe.count import head_width
from . import deepspeed_settings, router_rules
from .broken import Broken
from .config import Config, Launcher, Shape
from .schema import nearest_text
from .trackers import TRACKERS

BYTE_PIECES = 259
"""256 bytes and 3 marks."""


def broken_rules(config: Config, world: int) -> Iterator[Broken]:
    """Each rule that does not hold. After the first one the others may fail, so take one at a time."""
    for place, rule in enumerate(RULES):
        yield from (broken._replace(place=place) for broken in rule(config, world))


INTERVALS = {
    "steps": "[1, inf)",
    "seed": "[0, 9223372036854775808)",
    "sequence_length": "[1, inf)",
    "batch.sequences": "[1, inf)",
    "batch.micro": "[1, inf)",
    "model.layers": "[1, inf)",
    "model.width": "[1, inf)",
    "model.heads": "[1, inf)",
    "model.kv_heads": "[1, inf)",
    "model.head_width": "[1, inf)",
    "model.hidden": "[1, inf)",
    "model.vocabulary": "[1, inf)",
    "model.dense_first": "[0, inf)",
    "model.moe_every": "[1, inf)",
    "model.norm_epsilon": "(0, inf)",
    "model.embedding_multiplier": "(0, inf)",
    "model.output_multiplier": "(0, inf)",
    "model.output_softcap": "(0, inf)",
    "model.init_std": "(0, inf)",
    "model.mtp_depth": "[0, inf)",
    "model.mtp_coefficient": "[0, inf)",
    "model.attention.window": "[1, inf)",
    "model.attention.window_every": "[1, inf)",
    "model.attention.softcap": "(0, inf)",
    "model.attention.scale": "(0, inf)",
    "model.attention.rope.theta": "(1, inf)",
    "model.attention.rope.fraction": "(0, 1]",
    "model.attention.rope.factor": "[1, inf)",
    "model.attention.rope.original_length": "[1, inf)",
    "model.attention.rope.beta_fast": "(0, inf)",
    "model.attention.rope.beta_slow": "(0, inf)",
    "model.attention.rope.attention_factor": "(0, inf)",
    "model.attention.rope.mscale": "[0, inf)",
    "model.attention.rope.mscale_all": "[0, inf)",
    "model.attention.rope.low_frequency_factor": "(0, inf)",
    "model.attention.rope.high_frequency_factor": "(0, inf)",
    "model.attention.mla.q_rank": "[1, inf)",
    "model.attention.mla.kv_rank": "[1, inf)",
    "model.attention.mla.nope_width": "[1, inf)",
    "model.attention.mla.rope_width": "[2, inf)",
    "model.attention.mla.value_width": "[1, inf)",
    "model.moe.experts": "[0, inf)",
    "model.moe.top_k": "[1, inf)",
    "model.moe.hidden": "[1, inf)",
    "model.moe.shared_hidden": "[0, inf)",
    **router_rules.INTERVALS,
    "model.moe.z_coefficient": "[0, inf)",
    "parallel.tensor": "[1, inf)",
    "parallel.shard": "[1, inf)",
    "parallel.expert": "[1, inf)",
    "parallel.timeout_seconds": "(0, inf)",
    "data.validation_fraction": "(0, 1)",
    "data.synthetic_documents": "[2, inf)",
    "tokenizer.pieces": "[260, inf)",
    "tokenizer.sample_bytes": "[1, inf)",
    "optimizer.lr": "(0, inf)",
    "optimizer.beta1": "[0, 1)",
    "optimizer.beta2": "[0, 1)",
    "optimizer.epsilon": "(0, inf)",
    "optimizer.weight_decay": "[0, inf)",
    "optimizer.clip_norm": "(0, inf)",
    "schedule.warmup": "[0, inf)",
    "schedule.decay": "[1, inf)",
    "schedule.final": "[0, 1]",
    "evaluate.every": "[0, inf)",
    "evaluate.sequences": "[1, inf)",
    "checkpoint.every": "[0, inf)",
    "checkpoint.keep": "[1, inf)",
    "log.every": "[1, inf)",
    "sample.tokens": "[0, inf)",
    "sample.temperature": "[0, inf)",
    "sample.top_p": "(0, 1]",
    **deepspeed_settings.INTERVALS,
    "launch.nodes": "[1, inf)",
    "launch.ranks": "[1, inf)",
    "launch.max_restarts": "[0, inf)",
}
"""Where each number must lie, unless it is null; ( and ) exclude the bound."""


def intervals(config: Config, world: int) -> Iterator[Broken]:
    for key, interval in INTERVALS.items():
        value = attrgetter(key)(config)
        if value is not None and not _inside(value, interval):
            yield Broken(key, f"must be in {interval}", _around(key, interval))


def model(config: Config, world: int) -> Iterator[Broken]:
    c = config.model
    if _moe_layers(c) and c.width % 8:
        yield Broken("model.width", "must be a multiple of 8, grouped products want rows of 16 bytes", _multiples(8, c.width))
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
        yield Broken("model.kv_heads", f"must divide model.heads={c.heads}", _divisors(c.heads))
    if c.head_width is None and c.width % c.heads:
        yield Broken("model.heads", f"must divide model.width={c.width}", _divisors(c.width))
    if fraction == 1 and c.head_width is None and c.width // c.heads % 2:
        yield Broken("model.heads", f"must divide model.width={c.width} into even heads, rotation takes pairs", _divisors(c.width))
    if fraction == 1 and c.head_width is not None and c.head_width % 2:
        yield Broken("model.head_width", "must be even, rotary embeddings take pairs", _multiples(2, c.head_width))
    width = head_width(c)
    if abs(fraction * width / 2 - round(fraction * width / 2)) > 1e-9:
        rule = f"must be an even share of the {width} dimensions of a head, rotation takes pairs"
        yield Broken("model.attention.rope.fraction", rule, [pairs * 2 / width for pairs in range(1, width // 2 + 1)])


def _latent(c: ModelConfig) -> Iterator[Broken]:
    """What multi-head latent attention has no place for, and its rotary part."""
    a = c.attention
    if a.mla.rope_width % 2:
        yield Broken(
            "model.attention.mla.rope_width", "must be even, rotary embeddings take pairs", _multiples(2, a.mla.rope_width)
        )
    left_out = ("rope.fraction", 1.0), ("qk_norm", QKNorm.none), ("qkv_bias", False), ("output_bias", False), ("sinks", False)
    for name, value in left_out:
        if attrgetter(name)(a) != value:
            text = value.value if isinstance(value, QKNorm) else str(value).lower().removesuffix(".0")
            yield Broken(f"model.attention.{name}", f"must be {text} with model.attention.kind=mla", [value])


def experts(config: Config, world: int) -> Iterator[Broken]:
    c = config.model.moe
    if not _moe_layers(config.model):
        return
    if c.top_k > c.experts:
        yield Broken("model.moe.top_k", f"must be at most model.moe.experts={c.experts}", [c.experts])
    if c.hidden % 8:
        yield Broken("model.moe.hidden", "must be a multiple of 8, grouped products want rows of 16 bytes", _multiples(8, c.hidden))


def tokenizer(config: Config, world: int) -> Iterator[Broken]:
    rows, trained = config.model.vocabulary, config.tokenizer.path is None
    if config.tokenizer.kind is TokenizerKind.bytes and rows < BYTE_PIECES:
        rule = f"must be at least {BYTE_PIECES}, the pieces of tokenizer=bytes"
        yield Broken("model.vocabulary", rule, range(BYTE_PIECES, 2 * BYTE_PIECES))
    if config.tokenizer.kind is TokenizerKind.sentencepiece and trained and config.tokenizer.pieces > rows:
        yield Broken("tokenizer.pieces", f"must be at most model.vocabulary={rows}", [rows])


def schedule(config: Config, world: int) -> Iterator[Broken]:
    decay = config.schedule.decay
    if config.schedule.shape is Shape.wsd and decay is not None and decay > config.steps:
        yield Broken("schedule.decay", f"must be at most steps={config.steps}", [config.steps])


def trackers(config: Config, world: int) -> Iterator[Broken]:
    wrong = [name for name in config.tracker.names if name not in TRACKERS]
    if wrong:
        right = [nearest_text(str(name), TRACKERS) if name in wrong else name for name in config.tracker.names]
        yield Broken("tracker.names", f"may hold {', '.join(TRACKERS)}", [list(dict.fromkeys(right))])


def degrees(config: Config, world: int) -> Iterator[Broken]:
    """The parallel degrees against the model."""
    p, c = config.parallel, config.model
    for key in _cut_by_tensor(c):
        if attrgetter(key)(config) % p.tensor:
            yield Broken("parallel.tensor", f"must divide {key}={attrgetter(key)(config)}", _divisors(attrgetter(key)(config)))
    if p.expert > 1 and not _moe_layers(c):
        yield Broken("parallel.expert", "must be 1, no layer of the model has experts", [1])
    if _moe_layers(c) and c.moe.experts % p.expert:
        yield Broken("parallel.expert", f"must divide model.moe.experts={c.moe.experts}", _divisors(c.moe.experts))


def ranks(config: Config, world: int) -> Iterator[Broken]:
    """The parallel degrees against the ranks that there are."""
    p = config.parallel
    for key, degree in (("parallel.tensor", p.tensor), ("parallel.expert", p.expert)):
        if world % degree:
            yield Broken(key, _needs(degree, world), {degree, *_divisors(world)})
    data = world // p.tensor
    if data % p.shard:
        rule = (
            _needs(p.shard, world)
            if world == 1
            else f"must divide the {data} data ranks ({world} ranks / parallel.tensor={p.tensor})"
        )
        yield Broken("parallel.shard", rule, {p.shard, *_divisors(data)})


def batch(config: Config, world: int) -> Iterator[Broken]:
    sequences, data = config.batch.sequences, world // config.parallel.tensor
    micro = config.batch.micro or 1
    if sequences % data:
        rule = f"must be a multiple of the {data} data ranks ({world} ranks / parallel.tensor={config.parallel.tensor})"
        yield Broken("batch.sequences", rule, _multiples(data * micro, sequences))
    if sequences // data % micro:
        rule = f"must divide the {sequences // data} sequences of a rank (batch.sequences={sequences} over {data} data ranks)"
        yield Broken("batch.micro", rule, _divisors(sequences // data))


def launch(config: Config, world: int) -> Iterator[Broken]:
    c = config.launch
    for key, count in (("launch.ranks", c.ranks), ("launch.nodes", c.nodes)):
        if c.kind is Launcher.inline and world == 1 and count > 1:
            yield Broken(key, "launch=inline starts no ranks, launch=torchrun does", [1])


RULES: list[Callable[[Config, int], Iterator[Broken]]] = [
    intervals,
    model,
    attention,
    experts,
    router_rules.routers,
    tokenizer,
    schedule,
    trackers,
    degrees,
    ranks,
    batch,
    deepspeed_settings.engine,
    launch,
]
"""In the order of checking: later ones may rely on earlier ones."""


def _needs(degree: int, world: int) -> str:
    if world == 1:
        return f"needs {degree} ranks (or a multiple) and this is 1 process, use launch=torchrun launch.ranks={degree} or torchrun"
    return f"must divide the {world} ranks"


def _cut_by_tensor(c: ModelConfig) -> Iterator[str]:
    """The sizes that tensor-parallel ranks share."""
    yield "model.heads"
    if c.attention.kind is AttentionKind.gqa:
        yield "model.kv_heads"
    if _moe_layers(c) < c.layers + c.mtp_depth:
        yield "model.hidden"
    yield from ("model.vocabulary", "sequence_length")


def _moe_layers(c: ModelConfig) -> int:
    return sum(c.moe_layer(index) for index in range(c.layers + c.mtp_depth))


def _inside(value: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    return (low <= value if interval[0] == "[" else low < value) and (value <= high if interval[-1] == "]" else value < high)


def _around(key: str, interval: str) -> list[object]:
    """Values inside: the bounds where they belong to it, the whole numbers above the lower one, and the default."""
    default = attrgetter(key)(Config())
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    if isinstance(default, float):
        return [value for value in (low, high, default) if _inside(value, interval)]
    return [*range(int(low), int(low) + 64), *([] if default is None else [default])]


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _multiples(unit: int, number: int) -> list[int]:
    """The positive multiples of `unit` closest to `number`."""
    below = number // unit
    return [unit * factor for factor in range(max(1, below - 8), below + 9)]
