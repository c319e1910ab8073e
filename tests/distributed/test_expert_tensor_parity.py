"""Expert tensor parallelism gives the numbers of one process on every layout, in fp64: losses, counts, every gradient, weights.

The ranks of an expert_tensor group route different tokens. Experts have biases (as in gpt-oss), tokens are dropped, ranks and
experts get none, and gradients are accumulated.
"""

from typing import Any

import pytest
from sameness import STEPS, VOCABULARY, Case, Layout, assert_layout_gives_the_numbers_of_one_process, reference
from tokenyard.moe.config import Activation, BalanceConfig, CapacityConfig, ModelConfig, MoEConfig, Scope

LAYOUTS = {
    "expert_tensor 2": Layout(2, expert_tensor=2),
    "expert_tensor 4": Layout(4, expert_tensor=4),
    "expert 2 x expert_tensor 2": Layout(4, expert=2, expert_tensor=2),
    "tensor 2, expert_tensor 2 over it": Layout(2, tensor=2, expert_tensor=2),
    "tensor 2 x expert_tensor 2": Layout(4, tensor=2, expert_tensor=2),
    "tensor 4, expert 2 x expert_tensor 2 over it, recompute": Layout(4, tensor=4, expert=2, expert_tensor=2, recompute=True),
    "shard 2 x expert_tensor 2": Layout(4, shard=2, expert_tensor=2),
    "shard 4 x expert_tensor 2, zero 1": Layout(4, shard=4, expert_tensor=2, zero=1),
    "shard 2 x tensor 2 x expert_tensor 2, recompute": Layout(4, shard=2, tensor=2, expert_tensor=2, recompute=True),
}


def case(micro_batches: int = 1, equal_scores: bool = False, idle_rows: int = 0, **changes: Any) -> Case:
    capacity = CapacityConfig(factor=changes.pop("capacity_factor", None), scope=Scope.batch, pad=changes.pop("pad", False))
    balance = BalanceConfig(coefficient=0.05, scope=Scope.batch)
    moe = MoEConfig(**({"experts": 8, "hidden": 16, "z_coefficient": 0.01, "balance": balance, "capacity": capacity} | changes))
    sizes: dict[str, Any] = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 4, "hidden": 24, "vocabulary": VOCABULARY}
    steps = 1 if equal_scores else STEPS  # the experts that had no token are then equal, and rounding would decide between them
    return Case(ModelConfig(**sizes, init_std=0.3, moe=moe), micro_batches, equal_scores, idle_rows, steps)


CASES = {
    "biases, clamped swiglu, two micro-batches": case(2, bias=True, activation=Activation.swiglu_clamped),
    "biases, dropping": case(bias=True, capacity_factor=0.8),
    "all tokens to one expert, shared expert": case(equal_scores=True, bias=True, top_k=1, shared_hidden=16),
    "padded rows, idle rows, no gate": case(idle_rows=4, capacity_factor=0.5, pad=True, activation=Activation.relu_squared),
}


@pytest.mark.fault(13)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_layout_gives_the_numbers_of_one_process(ranks, layout: Layout, name: str) -> None:
    assert_layout_gives_the_numbers_of_one_process(ranks, layout, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_worth_comparing_with(name: str) -> None:
    """Biases have moved from zero, an expert has no token, and tokens are dropped if the case drops any."""
    expected, moe = reference(CASES[name]), CASES[name].config.moe
    biases = [value for parameter, value in expected["gradients"].items() if parameter.endswith("down_bias")]
    assert len(biases) == (2 if moe.bias else 0) and all((bias != 0).any() for bias in biases)
    first = expected["steps"][0]
    assert (first.counts_LE.amin(1) == 0).all(), "no expert without tokens"
    assert moe.capacity.factor is None or first.dropped_L.sum() > 0
