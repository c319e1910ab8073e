"""A rank of any layout draws its part of the initial weights alone, and the parts have the bits of the whole.

Each rank in turn is one of the fake process group, whose collectives do nothing.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenyard.bench.scale.weights import is_random, numbers_drawn, random_numbers_held, rank_of
from tokenyard.moe.init import initialise
from tokenyard.moe.model import Transformer
from tokenyard.moe.philox import LANES
from tokenyard.parallel.apply import Parallel, local, parallelize
from tokenyard.parallel.apply import initialise as initialise_rank
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import build_mesh
from tokenyard.parallel.shard import ShardMetadata
from tokenyard.train.config.compose import CONF, compose
from torch import Tensor

NAMES = sorted(path.stem for path in (CONF / "model").glob("tiny_*.yaml"))
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "experts, tensors and shards": (4, {"expert": 2, "tensor": 2, "shard": 2}),
    "uneven shards": (3, {"shard": 3}),
    "stages and slices of experts": (8, {"pipeline": 2, "expert": 2, "expert_tensor": 2, "shard": 4}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["tiny_deepseek_v3", "tiny_qwen3_next", "tiny_gpt_oss"])
def test_parts_on_all_ranks_have_the_bits_of_the_whole(name: str, layout: str) -> None:
    """A run of numbers in a rectangle may begin and end inside a block of eight, and no more than these are drawn in vain."""
    expected = whole(name)
    held = dict.fromkeys(expected, 0)
    for parallel in on_ranks(name, layout):
        assert_parts_of(expected, parallel)
        for key, sharded in parallel.parameters.items():
            held[key] += math.prod(sharded.metadata.sizes)
        in_vain = numbers_drawn(parallel) - random_numbers_held(parallel)
        assert 0 <= in_vain < 2 * LANES * sum(runs(p.metadata) for key, p in parallel.parameters.items() if is_random(key))
    assert all(held[key] >= tensor.numel() for key, tensor in expected.items())


@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_drawn_in_parts(name: str) -> None:
    """The numbers drawn are those held; of a vector shorter than a block, the block."""
    for parallel in on_ranks(name, "experts, tensors and shards", only=3):
        assert_parts_of(whole(name), parallel)
        held = {key: local(p.parameter).numel() for key, p in parallel.parameters.items() if is_random(key)}
        assert numbers_drawn(parallel) == sum(max(numbers, LANES) for numbers in held.values())
        assert random_numbers_held(parallel) == sum(held.values())


def assert_parts_of(expected: dict[str, Tensor], parallel: Parallel) -> None:
    initialise_rank(parallel, 1)
    for key, sharded in parallel.parameters.items():
        assert torch.equal(local(sharded.parameter), sharded.metadata.cut(expected[key])), key


def runs(shard: ShardMetadata) -> int:
    """The number of runs of consecutive offsets that make the rectangle."""
    inner = max((dim for dim, size in enumerate(shard.sizes) if size < shard.shape[dim]), default=0)
    return math.prod(shard.sizes[:inner]) if math.prod(shard.sizes) else 0


def on_ranks(name: str, layout: str, only: int | None = None) -> Iterator[Parallel]:
    """Yields the model on each rank, with NaN for weights."""
    world, settings = LAYOUTS[layout]
    config, spread = compose([f"model={name}"]).model, ParallelConfig(**settings)
    for rank in range(world) if only is None else [only]:
        with rank_of(rank, world):
            with torch.device("meta"):
                model = Transformer(config)
            parallel = parallelize(model, build_mesh(spread), spread, torch.device("cpu"))
            for parameter in parallel.model.parameters():
                local(parameter.data).fill_(torch.nan)
            yield parallel


def whole(name: str) -> dict[str, Tensor]:
    model = Transformer(compose([f"model={name}"]).model)
    initialise(model, 1)
    return {key: parameter.detach() for key, parameter in model.named_parameters()}
