"""Rules of `parallel`: the degrees against the model and the ranks, the exchange, expert tensor parallelism."""

import math
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from operator import attrgetter

from ....moe.config import AttentionKind, DropPolicy, ModelConfig, Products, Selection
from ....moe.param_shapes import block_shapes
from ....parallel.config import DEEPEP_LACKS, ContextExchange, Exchange, ExchangeDtype, Overflow, PipelineSchedule, Recompute
from ....parallel.layout import node_ranks, sliced_dim
from ..config import Config, EngineKind, Precision
from ..environment import local_world_size
from ..launch import Launcher
from ..schema import written
from .model_rules import linear_blocks, moe_blocks
from .rule import Violation, divisors

MOST_ROWS = 2**31
"""The grouped products count rows in int32."""


def degrees(config: Config, world: int) -> Iterator[Violation]:
    """Checks the parallel degrees against the model."""
    p, c = config.parallel, config.model
    for key in _cut_by_tensor(c):
        if attrgetter(key)(config) % p.tensor:
            yield Violation("parallel.tensor", f"must divide {key}={attrgetter(key)(config)}", divisors(attrgetter(key)(config)))
    if p.expert > 1 and not moe_blocks(c):
        yield Violation("parallel.expert", "must be 1, no layer of the model has experts", [1])
    if moe_blocks(c) and c.moe.experts % p.expert:
        yield Violation("parallel.expert", f"must divide model.moe.experts={c.moe.experts}", divisors(c.moe.experts))


def ranks(config: Config, world: int) -> Iterator[Violation]:
    """Checks the parallel degrees against the ranks that there are."""
    p = config.parallel
    if world % p.pipeline:
        yield Violation("parallel.pipeline", _needs(p.pipeline, world), {p.pipeline, *divisors(world)})
        return
    world //= p.pipeline
    stage = " of a pipeline stage" if p.pipeline > 1 else ""
    for key, degree in (("parallel.tensor", p.tensor), ("parallel.expert", p.expert)):
        if world % degree:
            yield Violation(key, _needs(degree, world, stage, p.pipeline), {degree, *divisors(world)})
    data = world // p.tensor
    for key, degree in (("parallel.context", p.context), ("parallel.shard", p.shard)):
        if data % degree:
            rule = (
                _needs(degree, world, stage, p.pipeline)
                if world == 1
                else f"must divide the {data} data ranks ({world} ranks{stage} / parallel.tensor={p.tensor})"
            )
            yield Violation(key, rule, {degree, *divisors(data)})
    if p.shard > 1 and p.shard % p.context:
        rule = f"must be 1 or a multiple of parallel.context={p.context}, whose ranks are among the shards"
        yield Violation("parallel.shard", rule, [1, *(degree for degree in divisors(data) if degree % p.context == 0)])


def context(config: Config, world: int) -> Iterator[Violation]:
    """Checks parallel.context against the sequence, and what it cannot do. Kinds of attention that need all tokens belong here."""
    p, c = config.parallel, config.model
    if p.context == 1:
        return
    key, unit = "parallel.context", p.context * math.lcm(2, p.tensor)
    fitting = [
        degree for degree in divisors(config.sequence_length) if config.sequence_length % (degree * math.lcm(2, p.tensor)) == 0
    ]
    if config.sequence_length % unit:
        sliced = f" and parallel.tensor={p.tensor} slices" if p.tensor > 1 else ""
        rule = f"must divide sequence_length={config.sequence_length} into two chunks a rank{sliced}"
        yield Violation(key, rule, [1, *fitting])
    if config.engine.kind is EngineKind.deepspeed:
        yield Violation(key, "must be 1 with engine=deepspeed", [1])
    if linear_blocks(c):
        rule = f"must be 1 with linear attention ({linear_blocks(c)} of {c.layers} layers), whose state passes through all tokens"
        yield Violation(key, rule, [1])
    heads = c.heads // p.tensor
    if p.context_exchange is ContextExchange.heads and heads % p.context:
        rule = f"must divide the {heads} heads of a rank with parallel.context_exchange=heads"
        yield Violation(key, rule, [degree for degree in [1, *fitting] if heads % degree == 0])


def _needs(degree: int, world: int, stage: str = "", pipeline: int = 1) -> str:
    """Returns the rule that `world` (the ranks of a `stage`) must be a multiple of the parallel degree, in words."""
    if world == 1:
        ranks, have = degree * pipeline, f"1 rank{stage}" if stage else "1 process"
        return f"needs {ranks} ranks (or a multiple) and this is {have}, use launch=torchrun launch.ranks={ranks} or torchrun"
    return f"must divide the {world} ranks{stage}"


def _cut_by_tensor(c: ModelConfig) -> Iterator[str]:
    """Yields the sizes that tensor parallelism splits."""
    yield "model.heads"
    if c.attention.kind is AttentionKind.gqa:
        yield "model.kv_heads"
    if linear_blocks(c):
        yield "model.attention.delta.key_heads"
    if moe_blocks(c) < c.layers + c.mtp_depth:
        yield "model.hidden"
    yield from ("model.vocabulary", "sequence_length")


def exchange(config: Config, world: int) -> Iterator[Violation]:
    p = config.parallel
    if p.overlap_chunks > 1 and config.model.moe.capacity.pad:
        yield Violation("parallel.overlap_chunks", "must be 1 with model.moe.capacity.pad=true, every chunk would be padded", [1])
    if p.exchange is Exchange.hierarchical:
        yield from _nodes(config, world)
    elif p.node_ranks is not None:
        yield Violation(
            "parallel.node_ranks", f"must be null, only parallel.exchange={Exchange.hierarchical.value} reads it", [None]
        )
    if p.exchange_dtype is ExchangeDtype.fp8 and p.exchange in (Exchange.symmetric, Exchange.deepep):
        rule = f"must be wide with parallel.exchange={p.exchange.value}, whose kernels move rows of bf16"
        yield Violation("parallel.exchange_dtype", rule, [ExchangeDtype.wide])
    if p.exchange is Exchange.deepep:
        yield from _deepep(config)
    if p.exchange is Exchange.symmetric:
        yield from _symmetric(config, world)
    elif p.exchange_overflow is not Overflow.fatal:
        rule = f"must be {Overflow.fatal.value}, only parallel.exchange={Exchange.symmetric.value} reads it"
        yield Violation("parallel.exchange_overflow", rule, [Overflow.fatal])


def _deepep(config: Config) -> Iterator[Violation]:
    """DeepEP is an optional package, whose kernels take rows in bf16 and no keys for dropout."""
    key, here = "parallel.exchange", "with parallel.exchange=deepep"
    if find_spec("deep_ep") is None:
        yield Violation(key, DEEPEP_LACKS, [Exchange.deduplicated])
    if config.precision not in (Precision.auto, Precision.bf16):
        yield Violation("precision", f"must be bf16 {here}", [Precision.bf16])
    if config.model.moe.dropout > 0:
        yield Violation("model.moe.dropout", f"must be 0 {here}, whose rows carry no keys", [0.0])


def _symmetric(config: Config, world: int) -> Iterator[Violation]:
    """Ranks can write into each other's memory inside a node only, and count rows in int32."""
    p, moe, key = config.parallel, config.model.moe, "parallel.exchange"
    group, ranks = p.expert * p.expert_tensor, node_ranks(p, world, _local_ranks(config))
    if p.expert > 1 and ranks % group:
        rule = f"must not be symmetric where the {group} ranks of an expert group are not inside a node of {ranks}"
        yield Violation(key, rule, [Exchange.hierarchical, Exchange.deduplicated])
    if p.overlap_chunks > 1:
        yield Violation("parallel.overlap_chunks", f"must be 1 with {key}=symmetric, which has nothing to overlap", [1])
    sequences = config.batch.micro or max(1, config.batch.sequences * p.tensor * p.context * p.pipeline // world)
    share = sequences * config.sequence_length // (p.tensor * p.context) * moe.top_k
    if share * min(p.exchange_rows, p.expert) >= MOST_ROWS:
        rule = f"must leave the {share} rows of an even share below 2**31 in all"
        yield Violation("parallel.exchange_rows", rule, [MOST_ROWS // 2 // share])


def _local_ranks(config: Config) -> int | None:
    """Returns the ranks of a node, as far as the launcher says."""
    local = local_world_size()
    if local is None and config.launch.kind is not Launcher.inline:  # the ranks are not started yet
        local = config.launch.ranks
    return local


def _nodes(config: Config, world: int) -> Iterator[Violation]:
    """The ranks that share experts must fill whole nodes or lie inside one."""
    p = config.parallel
    ranks = node_ranks(p, world, _local_ranks(config))
    if p.expert % ranks == 0 or ranks % p.expert == 0:
        return
    rule = f"must divide parallel.expert={p.expert} or be a multiple of it"
    if p.node_ranks is None:
        rule += f", and a node has {ranks} ranks"
    yield Violation("parallel.node_ranks", rule, divisors(p.expert))


def pipeline(config: Config, world: int) -> Iterator[Violation]:
    """Checks the stages of a pipeline against the model, and what is not done in stages."""
    p, layers, kind = config.parallel, config.model.layers, config.parallel.pipeline_schedule
    if p.pipeline == 1:
        unread = {
            "pipeline_schedule": [PipelineSchedule["1f1b"]] if kind is not PipelineSchedule["1f1b"] else None,
            "pipeline_chunks": [None] if p.pipeline_chunks is not None else None,
            "pipeline_layers": [None] if p.pipeline_layers is not None else None,
            "pipeline_overlap": [False] if p.pipeline_overlap else None,
        }
        for name, right in unread.items():
            if right is not None:
                yield Violation(f"parallel.{name}", "must be left as it is, parallel.pipeline=1 has one stage", right)
        return
    chunks = {PipelineSchedule["1f1b"]: 1, PipelineSchedule["zbh1"]: 1, PipelineSchedule["zbv"]: 2}.get(kind)
    if chunks is not None and p.pipeline_chunks not in (None, chunks):
        rule = f"must be null or {chunks} with parallel.pipeline_schedule={kind.value}"
        yield Violation("parallel.pipeline_chunks", rule, [None])
    if chunks is None and p.pipeline_chunks == 1:
        yield Violation("parallel.pipeline_chunks", "must be 2 or more with parallel.pipeline_schedule=interleaved", [2])
    if p.pipeline_overlap and p.pipeline_stages == p.pipeline:
        rule = (
            f"must be false with parallel.pipeline_schedule={kind.value}, where passes beside each other would wait for each other"
        )
        yield Violation("parallel.pipeline_overlap", rule, [False])
    if p.pipeline_overlap and p.expert == 1:
        yield Violation("parallel.pipeline_overlap", "must be false with parallel.expert=1, experts then exchange nothing", [False])
    elif p.pipeline_overlap and p.exchange in (Exchange.symmetric, Exchange.deepep):
        rule = f"must be false with parallel.exchange={p.exchange.value}, for which no pass waits"
        yield Violation("parallel.pipeline_overlap", rule, [False])
    if p.pipeline_stages > layers + 1:
        rule = f"makes {p.pipeline_stages} stages, and model.layers={layers} can be cut into at most {layers + 1}"
        yield Violation("parallel.pipeline", rule, range(layers + 1, 0, -1))
    sizes = p.pipeline_layers
    if sizes is not None and (
        len(sizes) != p.pipeline_stages or sum(sizes) != layers or min([1, *sizes[:-1]]) < 1 or sizes[-1] < 0
    ):
        rule = f"must be {p.pipeline_stages} numbers that add up to model.layers={layers}, of which only the last may be 0"
        yield Violation("parallel.pipeline_layers", rule, [None])


def recompute(config: Config, world: int) -> Iterator[Violation]:
    """Checks what a compiled block can keep: its operators are fused, and results cannot be kept, or sent away, one by one."""
    if config.compile and config.parallel.recompute in (Recompute.selective, Recompute.offload):
        yield Violation("parallel.recompute", "must be none or block with compile=true", [Recompute.block])


def cuda_graph(config: Config, world: int) -> Iterator[Violation]:
    """Checks that a micro-batch is the same launches in each step, for none of which the host must read or draw a number."""
    if not config.cuda_graph:
        return
    p, moe, experts = config.parallel, config.model.moe, bool(moe_blocks(config.model))
    one = ("tensor", "context", "shard", "pipeline", "expert_tensor")
    wanted: dict[str, object] = {**{f"parallel.{key}": 1 for key in one}, "engine.kind": EngineKind.torch, "model.dropout": 0.0}
    wanted["optimizer.qk_clip"] = None
    if p.expert > 1:
        wanted["parallel.exchange"] = Exchange.symmetric
        if p.exchange_overflow is Overflow.repair:
            wanted["parallel.exchange_overflow"] = Overflow.fatal
    if p.recompute is Recompute.offload:
        wanted["parallel.recompute"] = Recompute.block
    if world > 1:
        wanted["debug.collectives"] = False
    if experts:
        wanted |= {"model.moe.dropout": 0.0, "model.moe.router.jitter": 0.0, "model.moe.router.noise": False}
        if moe.router.selection is Selection.gshard:
            wanted["model.moe.router.selection"] = Selection.top_k
        if moe.capacity.policy is DropPolicy.random:
            wanted["model.moe.capacity.policy"] = DropPolicy.position
        if p.expert == 1:
            drops = moe.capacity.factor or moe.capacity.schedule or moe.router.selection is Selection.expert_choice
            wanted |= {"model.moe.router.null_experts": 0, **({"model.moe.capacity.pad": True} if drops else {})}
    for key, value in wanted.items():
        if attrgetter(key)(config) != value:
            yield Violation(
                key, f"must be {written(value)} with cuda_graph=true, a graph has the same launches in each step", [value]
            )


def expert_tensor(config: Config, world: int) -> Iterator[Violation]:
    """Checks parallel.expert_tensor against the model, and against the number of ranks that hold each expert."""
    key, degree, c = "parallel.expert_tensor", config.parallel.expert_tensor, config.model
    if not moe_blocks(c):
        if degree > 1:
            yield Violation(key, "must be 1, no layer of the model has experts", [1])
        return
    if degree > 1 and c.moe.hidden % (8 * degree):
        rule = f"must divide model.moe.hidden={c.moe.hidden} into multiples of 8, grouped products want rows of 16 bytes"
        yield Violation(key, rule, [1] if c.moe.hidden % 8 else divisors(c.moe.hidden // 8))
    world //= config.parallel.pipeline
    holders = world // config.parallel.expert
    if holders % degree:
        expert = f" ({world} ranks / parallel.expert={config.parallel.expert})" if config.parallel.expert > 1 else ""
        rule = (
            _needs(degree, world)
            if world == 1
            else f"must divide the {holders} ranks{' that hold each expert' if expert else ''}{expert}"
        )
        yield Violation(key, rule, {degree, *divisors(holders)})


def products(config: Config, world: int) -> Iterator[Violation]:
    """Checks that ranks cut the operands of products in FP8 where blocks with a scale of their own begin."""
    p, c = config.parallel, config.model
    experts = {"model.moe.hidden": c.moe.hidden} if moe_blocks(c) else {}
    settings = (
        ("parallel.tensor", p.tensor, "model.products", c.products, partial(_cut_weights, c)),
        ("parallel.expert_tensor", p.expert_tensor, "model.moe.products", c.moe.products, lambda: experts),
    )
    for key, degree, setting, kind, sizes_of in settings:
        if kind is Products.wide or degree == 1:
            continue
        sizes = sizes_of()
        with_ = f"with {setting}={kind.value}"
        if kind is Products.fp8_rowwise and sizes:
            yield Violation(key, f"must be 1 {with_}, whose scales are of whole rows", [1])
        if kind.block is None:
            continue
        for name, size in sizes.items():
            if size % (degree * kind.block):
                fitting = [each for each in divisors(degree) if not any(size % (each * kind.block) for size in sizes.values())]
                yield Violation(key, f"must cut {name}={size} into multiples of {kind.block} {with_}", {1, *fitting})


def _cut_weights(c: ModelConfig) -> dict[str, int]:
    """Returns the sliced sizes of weights, by name, that model.products is about."""
    found: dict[str, int] = {}
    for index in range(c.layers + c.mtp_depth):
        for name, shape in block_shapes(c, index).items():
            dim = sliced_dim(name, c)
            of_attention = name.startswith("attention.") and not c.linear_layer(index)
            if dim is not None and len(shape) > 1 and (of_attention or name.startswith("dense.")):
                found[name] = shape[dim]
    return found
