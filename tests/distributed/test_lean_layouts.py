"""Lean optimizer states on layouts: after three steps the weights of one process, and the same bits of every moment."""

from typing import Any

import pytest
import torch
from sameness import Case, Layout, configured, rows_of
from tokenyard.moe.config import ModelConfig, MoEConfig
from tokenyard.parallel.shard import LocalShard
from tokenyard.train.config.config import OptimizerStates
from tokenyard.train.engine import TorchEngine
from tokenyard.train.lean_adamw import LeanAdamW
from tokenyard.train.setup import build_engine, build_parallel
from tokenyard.train.step import StepInput

MODEL = ModelConfig(
    layers=2, width=16, heads=4, kv_heads=2, hidden=16, vocabulary=40, dense_first=1, moe=MoEConfig(experts=4, top_k=2, hidden=16)
)
STEPS = 3
LAYOUTS = {
    "expert 2 x tensor 2": Layout(4, tensor=2, expert=2),
    "shard 4": Layout(4, shard=4),
    "shard 2 x expert 2, zero 1": Layout(4, shard=2, expert=2, zero=1),
    "shard 4 x expert_tensor 2, zero 2": Layout(4, shard=4, expert_tensor=2, zero=2),
    "pipeline 2 x shard 2": Layout(4, pipeline=2, shard=2),
}


def trained(layout: Layout, states: OptimizerStates, offload: bool) -> dict[str, LocalShard]:
    """Returns what this rank would save after three steps in fp64."""
    case = Case(MODEL, micro_batches=2)
    config = configured(layout, case)
    config.optimizer.states, config.optimizer.offload = states, offload
    parallel = build_parallel(config, torch.device("cpu"))
    engine = build_engine(config, parallel)
    assert isinstance(engine, TorchEngine)
    for step in range(STEPS):
        engine.step(StepInput(rows_of(parallel, step, case), 0.01, 1.0))
    assert isinstance(engine.optimizer, LeanAdamW) == (offload or states is not OptimizerStates.fp32)
    return {name: LocalShard(shard.metadata, shard.tensor.detach().clone()) for name, shard in engine.state_to_save().items()}


@pytest.mark.parametrize("states", [OptimizerStates.bf16, OptimizerStates.int8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_has_the_weights_and_the_moments_of_one_process(ranks: Any, name: str, states: OptimizerStates) -> None:
    """With the moments in the memory of the host, which changes nothing."""
    expected, seen = trained(Layout(1), states, offload=False), set[str]()
    lean = {each for each, shard in expected.items() if shard.tensor.dtype in (torch.bfloat16, torch.uint8)}
    assert len(lean) > 10
    for held in ranks(LAYOUTS[name].world, trained, LAYOUTS[name], states, True):
        for each, (metadata, tensor) in held.items():
            wanted = metadata.cut(expected[each].tensor)
            seen.add(each)
            if each in lean:
                assert torch.equal(tensor, wanted), each
            else:
                torch.testing.assert_close(tensor, wanted, rtol=1e-6 if "scale" in each else 1e-9, atol=1e-12, msg=each)
    assert seen == set(expected)


def test_states_change_the_weights_by_less_than_an_update() -> None:
    weights = [
        {name: shard.tensor for name, shard in trained(Layout(1), states, offload=False).items() if name.startswith("model.")}
        for states in OptimizerStates
    ]
    exact, *lean = weights
    for found in lean:
        differences = [(found[name] - exact[name]).abs().max().item() for name in exact]
        assert 1e-7 < max(differences) < 0.01
