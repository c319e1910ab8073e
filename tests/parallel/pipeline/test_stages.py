"""How layers are cut: against all cuts there are; what each rank holds; what is set wins."""

import itertools
import math

import pytest
from tokenyard.moe.config import ModelConfig
from tokenyard.moe.param_count import flops_by_layer, flops_per_token
from tokenyard.moe.param_shapes import shapes
from tokenyard.parallel.config import ParallelConfig, PipelineSchedule
from tokenyard.parallel.layout import rank_shapes
from tokenyard.parallel.pipeline.stages import COST_LENGTH, cut_layers, held_on
from tokenyard.train.config.compose import compose

PRESETS = ["tiny_deepseek_v3", "tiny_gpt_oss", "tiny_glm_4_7_flash", "tiny"]


def model(name: str, layers: int | None = None) -> ModelConfig:
    config = compose([f"model={name}"]).model
    config.layers = layers or config.layers
    return config


@pytest.mark.parametrize("name", PRESETS)
def test_the_costs_are_those_of_the_model(name: str) -> None:
    config = model(name)
    layers, after = flops_by_layer(config, 1000)
    head = 2 * config.width * config.vocabulary
    assert sum(layers) + head == pytest.approx(flops_per_token(config, 1000), abs=config.layers)  # halves are rounded in each layer
    assert (after > head) == (config.mtp_depth > 0)


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("name", PRESETS)
def test_no_other_cut_is_cheaper(name: str, stages: int) -> None:
    config = model(name, layers=7)
    found = [len(inside) for inside in cut_layers(config, ParallelConfig(pipeline=stages))]
    cuts = itertools.combinations_with_replacement(range(config.layers + 1), stages - 1)
    sizes = [[b - a for a, b in itertools.pairwise((0, *ends, config.layers))] for ends in cuts]
    costs = {tuple(each): cost(config, each) for each in sizes if min(each[:-1]) > 0}
    assert costs[tuple(found)] == min(costs.values())


def cost(config: ModelConfig, sizes: list[int]) -> tuple[int, int]:
    """The most FLOPs of a stage, and the most parameters, each counted by the names that a rank holds."""
    ends = list(itertools.accumulate(sizes))
    cut = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    layers, after = flops_by_layer(config, COST_LENGTH)
    flops = [sum(layers[index] for index in inside) for inside in cut]
    flops[-1] += after
    held = [held_on(config, cut, ParallelConfig(pipeline=len(cut)), rank, shapes(config)) for rank in range(len(cut))]
    return max(flops), max(sum(map(math.prod, each.values())) for each in held)


def test_a_costly_head_has_a_stage_of_its_own() -> None:
    config = model("tiny_gpt_oss")
    config.vocabulary = 10**6
    assert [len(inside) for inside in cut_layers(config, ParallelConfig(pipeline=2))] == [config.layers, 0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunks", [1, 2])
def test_ranks_hold_every_parameter_once(tied: bool, chunks: int) -> None:
    """Only the embedding is on the last rank again, for a tied head and for multi-token prediction."""
    config = model("tiny_deepseek_v3")
    config.tie_embeddings, config.mtp_depth = tied, 0 if tied else 1
    schedule = PipelineSchedule["interleaved" if chunks > 1 else "1f1b"]
    sizes = [2, 1] if chunks == 1 else [1, 1, 1, 0]
    parallel = ParallelConfig(pipeline=2, pipeline_schedule=schedule, pipeline_layers=sizes)
    held = [held_on(config, cut_layers(config, parallel), parallel, rank, shapes(config)) for rank in range(2)]
    assert set(held[0]) | set(held[1]) == set(shapes(config))
    assert set(held[0]) & set(held[1]) == {"embedding.weight"}
    assert any(name.startswith(f"layers.{2 if chunks == 2 else 1}.") for name in held[0])


def test_no_rank_holds_more_than_is_said() -> None:
    config, parallel = model("tiny_deepseek_v3"), ParallelConfig(pipeline=2, pipeline_layers=[1, 2], shard=2, expert=2)
    cut = cut_layers(config, parallel)
    assert cut == [range(1), range(1, 3)]
    most = rank_shapes(config, parallel, 4)
    alone = rank_shapes(config, ParallelConfig(shard=2, expert=2), 2)
    assert most == held_on(config, cut, parallel, 1, alone)  # two layers of three, and all of prediction
