"""Shards of global tensors: what a rank holds, by tensor, expert and FSDP parallelism."""

import pytest
import torch
from tokenyard.moe.config import ModelConfig, MoEConfig
from tokenyard.moe.model import Transformer
from tokenyard.parallel.fsdp import shard_dim, stays_whole
from tokenyard.parallel.mesh import Axis
from tokenyard.parallel.shard import ShardMetadata, whole
from tokenyard.parallel.tensor import slice_parameter, sliced_dim

TENSOR = torch.arange(4 * 6 * 10).view(4, 6, 10)


def test_the_whole_is_everything() -> None:
    assert whole(TENSOR.shape) == ShardMetadata((4, 6, 10), (0, 0, 0), (4, 6, 10))
    assert torch.equal(whole(TENSOR.shape).cut(TENSOR), TENSOR)
    assert whole(torch.Size([])).cut(torch.tensor(3.0)) == 3.0


def test_cut_is_a_view_of_the_rectangle() -> None:
    part = ShardMetadata((4, 6, 10), (1, 0, 7), (2, 6, 3)).cut(TENSOR)
    assert torch.equal(part, TENSOR[1:3, :, 7:10])
    assert part.untyped_storage().data_ptr() == TENSOR.untyped_storage().data_ptr()


@pytest.mark.parametrize(("dim", "size"), [(0, 4), (1, 3), (2, 5), (1, 1)])
def test_chunks_are_torchs(dim: int, size: int) -> None:
    for rank, expected in enumerate(TENSOR.chunk(size, dim)):
        shard = whole(TENSOR.shape).chunk(dim, size, rank)
        assert torch.equal(shard.cut(TENSOR), expected) and shard.shape == TENSOR.shape


def test_a_chunk_of_a_chunk_is_a_part_of_it() -> None:
    twice = whole(TENSOR.shape).chunk(1, 2, 1).chunk(2, 5, 3).chunk(1, 3, 2)
    assert torch.equal(twice.cut(TENSOR), TENSOR[:, 5:6, 6:8])


def test_a_sliced_parameter_is_an_even_chunk() -> None:
    linear = torch.nn.Linear(6, 4)
    weight, shards = linear.weight.detach(), {"weight": whole((4, 6))}
    slice_parameter(linear, "weight", 1, Axis(3, 2, None), shards)
    assert torch.equal(linear.weight, weight[:, 4:]) and torch.equal(linear.weight, shards["weight"].cut(weight))
    with pytest.raises(AssertionError, match="does not divide by 4 in dimension 1"):
        slice_parameter(linear, "weight", 1, Axis(4, 0, None), {"weight": whole((4, 6))})


@pytest.mark.parametrize("shape", [(8, 3), (3, 8), (5, 3), (3, 3), (1, 7), (2, 6, 5)])
def test_shards_are_torchs_chunks_and_nothing_for_the_rest(shape: tuple[int, ...]) -> None:
    tensor, ranks = torch.arange(torch.Size(shape).numel()).view(shape), 4
    dim = shard_dim(shape, ranks)
    assert dim == next((d for d, size in enumerate(shape) if size % ranks == 0), 0)
    chunks = list(tensor.chunk(ranks, dim))
    for rank in range(ranks):
        part = whole(shape).chunk(dim, ranks, rank).cut(tensor)
        assert torch.equal(part, chunks[rank]) if rank < len(chunks) else part.numel() == 0


def test_shard_of_a_part_keeps_its_place_in_the_whole() -> None:
    expert_part = whole((4, 6, 10)).chunk(0, 2, 1)
    shard = expert_part.chunk(shard_dim(expert_part.sizes, 3), 3, 2)
    assert torch.equal(shard.cut(TENSOR), TENSOR[2:4, 4:6])


def test_which_parameters_are_sliced_and_which_stay_whole() -> None:
    moe = MoEConfig(experts=4, hidden=8, shared_hidden=8)
    model = Transformer(ModelConfig(layers=2, width=16, heads=4, kv_heads=2, dense_first=1, hidden=8, vocabulary=32, moe=moe))
    sliced = {
        name: sliced_dim(name, model.config) for name, _ in model.named_parameters() if sliced_dim(name, model.config) is not None
    }
    attention = {f"layers.{i}.attention.{p}.weight": 1 if p == "o" else 0 for i in (0, 1) for p in "qkvo"}
    dense = {"layers.0.dense.gate_up": 1, "layers.0.dense.down": 1}
    assert sliced == {"embedding.weight": 0, "head.weight": 0, **attention, **dense}
    kept = {name for name, parameter in model.named_parameters() if stays_whole(name, parameter.ndim)}
    norms = {f"layers.{i}.{kind}_norm.weight" for i in (0, 1) for kind in ("attention", "feedforward")}
    assert kept == {"norm.weight", "layers.1.moe.router.weight", *norms}
