"""A rank reads any rectangle of our tensors from a Hugging Face folder, and no more than that."""

import random
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import DELTA, MLA
from safetensors.torch import load_file, save_file
from tokenyard.interop import load_weights, quantized
from tokenyard.interop.load_weights import open_source, read_shards, read_weights
from tokenyard.parallel.shard import LocalShard, ShardMetadata, whole

CASES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 8},
    "DeepseekV3": {**MLA, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "Llama": {"tie_word_embeddings": True},
    "Qwen3Next": {**DELTA, "attention_bias": True},
    "Qwen3_5Moe": DELTA,
}


def rectangle(shape: tuple[int, ...], draw: random.Random) -> ShardMetadata:
    offsets = tuple(draw.randrange(size) for size in shape)
    return ShardMetadata(shape, offsets, tuple(draw.randint(1, size - offset) for size, offset in zip(shape, offsets, strict=True)))


def filled(source: load_weights.HFSource, shapes: dict[str, ShardMetadata], complete: bool = True) -> dict[str, torch.Tensor]:
    """The rectangles, each in the middle of a larger tensor and in fp64, so that a strided target and a conversion are tried."""
    held = {}
    for name, shard in shapes.items():
        wider = torch.full([size + 2 for size in shard.sizes], torch.nan, dtype=torch.float64)
        held[name] = LocalShard(shard, wider[tuple(slice(1, -1) for _ in shard.sizes)])
    read_shards(source, held, complete)
    return {name: shard.tensor for name, shard in held.items()}


@pytest.mark.parametrize("family", CASES)
def test_any_rectangle_is_that_of_the_whole_tensor(family: str, saved: Callable[..., Path]) -> None:
    source, draw = open_source(saved(family, **CASES[family])), random.Random(0)
    expected = read_weights(source)
    for attempt in range(25):
        shards = {name: rectangle(tuple(t.shape), draw) if attempt else whole(t.shape) for name, t in expected.items()}
        for name, tensor in filled(source, shards, attempt == 0).items():
            assert torch.equal(tensor, shards[name].cut(expected[name]).double()), (name, shards[name])


def test_the_fused_experts_of_transformers_5(saved: Callable[..., Path]) -> None:
    """(E, P * F, D): a slice of F cuts both halves of the flattened dimension."""
    folder, draw = saved("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8), random.Random(1)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        one = [
            torch.stack([tensors.pop(f"{prefix}.{expert}.{name}_proj.weight") for expert in range(4)])
            for name in ("gate", "up", "down")
        ]
        tensors |= {f"{prefix}.gate_up_proj": torch.cat(one[:2], 1), f"{prefix}.down_proj": one[2]}
    expected = read_weights(open_source(folder))
    save_file(tensors, folder / "model.safetensors")
    source = open_source(folder)
    for _ in range(25):
        shards = {name: rectangle(tuple(t.shape), draw) for name, t in expected.items()}
        for name, tensor in filled(source, shards).items():
            assert torch.equal(tensor, shards[name].cut(expected[name]).double()), (name, shards[name])


def test_nothing_beyond_the_rectangles_is_read(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Counting:
        def __init__(self, part: Any) -> None:
            self.part = part

        def __getitem__(self, index: Any) -> torch.Tensor:
            read.append((found := self.part[index]).numel())
            return found

    @contextmanager
    def counted(path: Path) -> Any:
        with open_file(path) as file:
            yield type("File", (), {"get_slice": lambda self, name: Counting(file.get_slice(name))})()

    open_file = quantized.open_file
    source = open_source(saved("GptOss", num_local_experts=4, head_dim=8))
    monkeypatch.setattr(quantized, "open_file", counted)
    quarter = {name: whole(t.shape).chunk(0, 4, 1) for name, t in source.ours.items()}
    filled(source, quarter, complete=False)
    assert sum(read) == sum(torch.empty(shard.sizes).numel() for shard in quarter.values())
