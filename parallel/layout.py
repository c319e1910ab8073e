"""What each rank holds of each parameter, by name and shape. Without torch: layouts are computed before anything is built."""

import itertools
import math
import operator
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple

from ..moe.config import AttentionKind, ModelConfig, QKNorm
from ..moe.param_shapes import Shapes, shapes
from .config import ParallelConfig
from .pipeline.stages import cut_layers, held_on
from .shard import ShardMetadata, whole

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


class Digit(NamedTuple):
    """A dimension of a grid of ranks: the place of a rank in it is `rank // stride % size`."""

    size: int
    stride: int


def digits(names: Iterable[str], sizes: Mapping[str, int]) -> list[Digit]:
    """Returns the named dimensions, which are of one grid, the outermost first and none of size 1."""
    named = set(names)
    dims = DENSE if named <= set(DENSE) else EXPERTS
    inner = itertools.accumulate((sizes[dim] for dim in reversed(dims)), operator.mul, initial=1)
    found = [
        Digit(sizes[dim], stride) for dim, stride in zip(reversed(dims), inner, strict=False) if dim in named and sizes[dim] > 1
    ]
    return found[::-1]


def members(rank: int, dims: Sequence[Digit]) -> tuple[int, ...]:
    """Returns the ranks that differ from `rank` only in the digits `dims`, in ascending order."""
    found = [rank - sum(rank // stride % size * stride for size, stride in dims)]
    for size, stride in dims:
        found = [first + step for first in found for step in range(0, size * stride, stride)]
    return tuple(found)


def firsts(ranks: Iterable[int], dims: Sequence[Digit]) -> list[int]:
    """Returns the ranks that are the first of their `members`."""
    return [rank for rank in ranks if all(rank // stride % size == 0 for size, stride in dims)]


def ends(rank: int, dims: Sequence[Digit], stages: int, world: int) -> tuple[int, ...]:
    """Returns the members of a rank on its stage and on the other end of a pipeline; between the ends the rank alone."""
    inner = world // stages
    if 0 < rank // inner < stages - 1:
        return (rank,)
    return tuple(end + other for end in (0, world - inner) for other in members(rank % inner, dims))


def product_of(rank: int, dims: Sequence[Digit], known: Container[tuple[int, ...]]) -> list[tuple[int, ...]] | None:
    """Returns `known` groups of the rank whose dimensions together are `dims`, the outermost first; None if there are none."""
    whole = members(rank, dims)
    if whole in known or not dims:
        return [whole]
    for cut in range(len(dims) - 1, 0, -1):
        inner = members(rank, dims[cut:])
        if inner in known and (outer := product_of(rank, dims[:cut], known)) is not None:
            return [*outer, inner]
    return None


def node_digits(sizes: Mapping[str, int], node: int) -> list[Digit]:
    """Returns the expert dimension as one of nodes and one inside a node of `node` ranks; or as it is, if it lies inside a node or
    nodes have one rank of it.
    """
    experts, stride = sizes["expert"], sizes["expert_tensor"]
    inside = math.gcd(max(1, node // stride), experts)
    if inside in (1, experts):
        return [Digit(experts, stride)]
    return [Digit(experts // inside, inside * stride), Digit(inside, stride)]


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


def shard_of(
    name: str, shape: tuple[int, ...], config: ModelConfig, sizes: Mapping[str, int], by_fsdp: bool, rank: int
) -> ShardMetadata:
    """Returns what a rank of the stage with this parameter holds of it, as parallel/apply.py cuts it. `by_fsdp`: FSDP shards it."""
    shard, kind = whole(shape), "expert_" if ".experts." in name else ""
    place, left = dict[str, int](), rank
    for dim in reversed(EXPERTS if kind else DENSE):
        left, place[dim] = divmod(left, sizes[dim])
    if kind:
        shard = shard.chunk(0, sizes["expert"], place["expert"])
    sliced = sliced_dim_of_experts(name) if kind else sliced_dim(name, config)
    if sliced is not None:
        shard = shard.chunk(sliced, sizes[f"{kind}tensor"], place[f"{kind}tensor"])
    ways, own = sizes[f"{kind}shard"], place[f"{kind}shard"]
    if not kind:
        ways, own = ways * sizes["context"], own * sizes["context"] + place["context"]
    return shard.chunk(shard_dim(shard.sizes, ways), ways, own) if by_fsdp else shard


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
