"""What each rank holds of each parameter, by name and shape. No torch: a layout is counted before anything is built."""

import math

from .config import ParallelConfig

SLICED = {
    "embedding.weight": 0,
    "head.weight": 0,
    "attention.q.weight": 0,
    "attention.k.weight": 0,
    "attention.v.weight": 0,
    "attention.q.bias": 0,
    "attention.k.bias": 0,
    "attention.v.bias": 0,
    "attention.q_up.weight": 0,
    "attention.kv_up.weight": 0,
    "attention.sinks": 0,
    "attention.o.weight": 1,
    "dense.gate_up": 1,
    "dense.down": 1,
}
"""Endings of the names of sliced parameters, and the dimension that is sliced; all others are whole on every tensor rank."""


def sliced_dim(name: str) -> int | None:
    """The dimension in which tensor ranks share the parameter, or None."""
    return next((dim for ending, dim in SLICED.items() if name.endswith(ending)), None)


def stays_whole(name: str, dims: int) -> bool:
    """Whether FSDP leaves a parameter of so many dimensions alone: norms, biases and routers are small."""
    return dims < 2 or ".router." in name


def shard_dim(shape: tuple[int, ...], ranks: int) -> int:
    """The dimension that FSDP shards: the first that divides evenly, else the first."""
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


def expert_shard(parallel: ParallelConfig, world: int) -> int:
    """Ways in which FSDP shards experts: over as many of the ranks that hold the same experts as `shard` allows."""
    return math.gcd(parallel.shard, world // parallel.expert)


def rank_shape(name: str, shape: tuple[int, ...], parallel: ParallelConfig, world: int) -> tuple[int, ...]:
    """What rank 0 holds of a parameter between steps; where a dimension does not divide, no rank holds more."""
    sizes = list(shape)
    if ".experts." in name:
        sizes[0] //= parallel.expert
        ranks = expert_shard(parallel, world)
    else:
        sliced = sliced_dim(name)
        if sliced is not None:
            sizes[sliced] //= parallel.tensor
        ranks = 1 if stays_whole(name, len(sizes)) else parallel.shard
    if ranks > 1:
        dim = shard_dim(tuple(sizes), ranks)
        sizes[dim] = -(-sizes[dim] // ranks)
    return tuple(sizes)
