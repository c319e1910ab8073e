"""What each rank holds of each parameter, by name and shape. Without torch: layouts are computed before anything is built."""

import math

from ..moe.config import AttentionKind, ModelConfig, QKNorm
from ..moe.param_shapes import Shapes, shapes
from .config import ParallelConfig
from .pipeline.stages import cut_layers, held_on

SLICED = {
    "embedding.weight": 0,
    "head.weight": 0,
    "attention.q.weight": 0,
    "attention.k.weight": 0,
    "attention.v.weight": 0,
    "attention.q.bias": 0,
    "attention.k.bias": 0,
    "attention.v.bias": 0,
    "attention.gate.weight": 0,
    "attention.gate.bias": 0,
    "attention.beta.weight": 0,
    "attention.decay.weight": 0,
    "attention.dt_bias": 0,
    "attention.a_log": 0,
    "attention.q_conv.weight": 0,
    "attention.k_conv.weight": 0,
    "attention.v_conv.weight": 0,
    "attention.q_up.weight": 0,
    "attention.kv_up.weight": 0,
    "attention.sinks": 0,
    "attention.o.weight": 1,
    "dense.gate_up": 1,
    "dense.down": 1,
}
"""Suffixes of the names of sliced parameters, and the sliced dimension; all others are whole on every tensor rank."""

SLICED_OF_EXPERTS = {"experts.gate_up": 2, "experts.gate_up_bias": 2, "experts.down": 2}
"""The same for the hidden columns of experts over expert_tensor ranks. The bias of `down` is whole: one of the ranks adds it."""

ADDED_BY_ONE = ("attention.o.bias", "experts.down_bias")
"""Suffixes of the names of biases that only one rank of an (expert) tensor group adds, since the output is a sum over the group."""

NORMS_OF_ALL_HEADS = {"attention.q_norm.weight": 0, "attention.k_norm.weight": 0}
"""Sliced as well if the norm spans all heads."""

DENSE = ("pipeline", "replicate", "shard", "context", "tensor")
EXPERTS = ("pipeline", "expert_replicate", "expert_shard", "expert", "expert_tensor")


def mesh_sizes(parallel: ParallelConfig, world: int) -> dict[str, int]:
    """Returns the sizes of both grids of ranks, the last dimension of each varying fastest. The caller has checked divisibility."""
    assert world % parallel.pipeline == 0
    world //= parallel.pipeline
    assert world % dense_ranks(parallel) == 0 and world % (parallel.expert * parallel.expert_tensor) == 0
    shard, data_shard = expert_shard_ranks(parallel, world), dense_ranks(parallel) // parallel.context // parallel.tensor
    dense = (world // dense_ranks(parallel), data_shard, parallel.context, parallel.tensor)
    experts = (world // parallel.expert // parallel.expert_tensor // shard, shard, parallel.expert, parallel.expert_tensor)
    return {"pipeline": parallel.pipeline, **dict(zip(DENSE[1:] + EXPERTS[1:], dense + experts, strict=True))}


def dense_ranks(parallel: ParallelConfig) -> int:
    """Returns the ranks that hold a stage without experts once: FSDP shards over the context ranks, and over further data ranks."""
    return parallel.tensor * math.lcm(parallel.context, parallel.shard)


def fewest_ranks(parallel: ParallelConfig) -> int:
    """Returns the fewest ranks that fit the degrees; all world sizes that fit are multiples of it."""
    return parallel.pipeline * math.lcm(dense_ranks(parallel), parallel.expert * parallel.expert_tensor)


def rank_shapes(config: ModelConfig, parallel: ParallelConfig, world: int) -> Shapes:
    """Returns the shapes that a rank of `world` holds between steps. If a dimension or the layers do not divide evenly, no rank
    holds more.
    """
    world //= parallel.pipeline
    found = {name: _rank_shape(name, shape, config, parallel, world) for name, shape in shapes(config).items()}
    if parallel.pipeline == 1:
        return found
    cut = cut_layers(config, parallel)
    by_rank = (held_on(config, cut, parallel, rank, found) for rank in range(parallel.pipeline))
    return max(by_rank, key=lambda held: sum(map(math.prod, held.values())))


def sliced_dim(name: str, config: ModelConfig) -> int | None:
    """Returns the dimension that is sliced over tensor ranks, or None."""
    spanning = config.attention.kind is AttentionKind.gqa and config.attention.qk_norm is QKNorm.full
    sliced = SLICED | NORMS_OF_ALL_HEADS if spanning else SLICED
    return next((dim for ending, dim in sliced.items() if name.endswith(ending)), None)


def sliced_dim_of_experts(name: str) -> int | None:
    """Returns the dimension that is sliced over expert_tensor ranks, or None."""
    return next((dim for ending, dim in SLICED_OF_EXPERTS.items() if name.endswith(ending)), None)


def stays_whole(name: str, dims: int) -> bool:
    """Whether FSDP does not shard a parameter with this name and number of dimensions."""
    return dims < 2 or ".router." in name


def shard_dim(shape: tuple[int, ...], ranks: int) -> int:
    """Returns the dimension that FSDP shards: the first that divides evenly, else the first."""
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


def expert_shard_ranks(parallel: ParallelConfig, world: int) -> int:
    """Returns over how many ranks of a stage, of `world`, FSDP shards experts: those with the same experts, as `shard` allows."""
    return math.gcd(parallel.shard, world // (parallel.expert * parallel.expert_tensor))


def node_ranks(parallel: ParallelConfig, world: int, local: str | int | None) -> int:
    """Returns the ranks of a node: the setting, else the launcher's LOCAL_WORLD_SIZE (`local`), else all."""
    return parallel.node_ranks or int(local or world)


def _rank_shape(name: str, shape: tuple[int, ...], config: ModelConfig, parallel: ParallelConfig, world: int) -> tuple[int, ...]:
    sizes = list(shape)
    if ".experts." in name:
        sizes[0] //= parallel.expert
        sliced = sliced_dim_of_experts(name)
        if sliced is not None:
            sizes[sliced] //= parallel.expert_tensor
        ranks = expert_shard_ranks(parallel, world)
    else:
        sliced = sliced_dim(name, config)
        if sliced is not None:
            sizes[sliced] //= parallel.tensor
        ranks = 1 if stays_whole(name, len(sizes)) else parallel.shard
    if ranks > 1:
        dim = shard_dim(tuple(sizes), ranks)
        sizes[dim] = -(-sizes[dim] // ranks)
    return tuple(sizes)


def room(tokens: int, top_k: int, experts: int, ranks: int, rows: float) -> int:
    """Returns the rows of which the experts of each of `ranks` ranks can get in the symmetric exchange, of `tokens` tokens a rank.

    They are `rows` times the even share, and at most the rows that can come, since the experts of a token differ.
    """
    return min(math.ceil(rows * tokens * top_k), ranks * tokens * min(top_k, experts // ranks))


def data_ranks(parallel: ParallelConfig, world: int) -> int:
    """Returns the number of ranks with different rows of the batch."""
    return world // (parallel.tensor * parallel.context * parallel.pipeline)
