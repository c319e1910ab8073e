"""Small tensors of all kinds, and layouts that cut them."""

import math

import torch
from tokenyard.parallel.shard import ShardMetadata

SHAPES = {
    "model.embedding": ((13, 6), torch.float32),
    "model.layers.0.moe.experts.down": ((5, 7, 4), torch.bfloat16),
    "model.norm": ((3,), torch.float32),
    "optimizer.model.embedding.exp_avg": ((13, 6), torch.float64),
    "optimizer.step": ((), torch.float32),
    "data.counts": ((11,), torch.int64),
    "data.seen": ((9,), torch.bool),
    "model.nothing": ((0, 4), torch.float32),
}
LAYOUTS = ["grid", "shard", "columns", "replicate", "hybrid"]


def global_tensors():
    """Random bits, so not-a-numbers and subnormals are among them."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, (shape, dtype) in SHAPES.items():
        high = 2 if dtype == torch.bool else 256
        bits = torch.randint(high, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        tensors[name] = bits.view(dtype).reshape(shape)
    return tensors


def shard_of(layout: str, shape: tuple[int, ...], rank: int, world: int) -> ShardMetadata:
    """What `rank` of `world` holds of a tensor; shards of dimension 0 are uneven and the last ones may be empty, as in FSDP."""
    ways = [1] * len(shape)
    if layout == "grid" and len(shape) > 1:
        ways[0], ways[1] = max(world // 2, 1), min(world, 2)
    elif layout == "columns" and shape:
        ways[-1] = world
    elif layout == "hybrid" and shape:
        ways[0] = max(world // 2, 1)
    elif layout in ("shard", "grid") and shape:
        ways[0] = world
    offsets, sizes = [], []
    for extent, way in zip(shape, ways, strict=True):
        rank, index = divmod(rank, way)
        step = -(-extent // way)
        offsets.append(min(index * step, extent))
        sizes.append(min(step, extent - offsets[-1]))
    return ShardMetadata(shape, tuple(offsets), tuple(sizes))
