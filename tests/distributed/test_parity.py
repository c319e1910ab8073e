"""Every layout gives the numbers of one process, in fp64: losses, counts, every gradient, the norm, the weights after 3 steps.

Both losses are on, one expert never gets a token, some targets are not counted, and tokens are dropped where the case says so.
"""

from typing import Any

import pytest
from sameness import LENGTH, SEQUENCES, STEPS, VOCABULARY, Case, Layout, assert_layout_gives_the_numbers_of_one_process, reference
from tokenyard.moe.config import BalanceConfig, CapacityConfig, ModelConfig, MoEConfig, Scope

LAYOUTS = {
    "one process, recompute": Layout(1, recompute=True),
    "replicate 2": Layout(2),
    "shard 2": Layout(2, shard=2),
    "expert 2 of 2": Layout(2, expert=2),
    "tensor 2": Layout(2, tensor=2),
    "expert 2 over tensor 2": Layout(2, tensor=2, expert=2),
    "shard 2 x expert 2": Layout(2, shard=2, expert=2),
    "replicate 4": Layout(4),
    "replicate 2 x shard 2": Layout(4, shard=2),
    "shard 4": Layout(4, shard=4),
    "expert 4": Layout(4, expert=4),
    "expert 2 of 4": Layout(4, expert=2),
    "tensor 4": Layout(4, tensor=4),
    "tensor 2 x expert 2": Layout(4, tensor=2, expert=2),
    "tensor 2, expert 4 over both": Layout(4, tensor=2, expert=4),
    "shard 2 x expert 2, world 4": Layout(4, shard=2, expert=2),
    "shard 4 x expert 2, recompute": Layout(4, shard=4, expert=2, recompute=True),
    "tensor 2 x shard 2 x expert 2": Layout(4, tensor=2, shard=2, expert=2),
    "tensor 2 x shard 2 x expert 4, recompute": Layout(4, tensor=2, shard=2, expert=4, recompute=True),
    "tensor 4 x expert 2": Layout(4, tensor=4, expert=2),
}


def case(balance_scope: Scope = Scope.sequence, micro_batches: int = 1, equal_scores: bool = False, **changes: Any) -> Case:
    model = {name: changes.pop(name) for name in ("tie_embeddings", "dense_first") if name in changes}
    capacity = CapacityConfig(factor=changes.pop("capacity_factor", None), scope=changes.pop("capacity_scope", Scope.sequence))
    balance = BalanceConfig(coefficient=0.05, scope=balance_scope)
    moe = MoEConfig(experts=8, hidden=16, z_coefficient=0.01, balance=balance, capacity=capacity, **changes)
    sizes: dict[str, Any] = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 4, "hidden": 24, "vocabulary": VOCABULARY}
    steps = 1 if equal_scores else STEPS  # the experts that had no token are then equal, and rounding would decide between them
    return Case(ModelConfig(**sizes, init_std=0.3, moe=moe, **model), micro_batches, equal_scores, steps=steps)


CASES = {
    "dropless, balance by sequence": case(),
    "two micro-batches": case(micro_batches=2),
    "drops by sequence, balance by batch": case(capacity_factor=0.8, balance_scope=Scope.batch),
    "drops by batch, two micro-batches": case(
        capacity_factor=0.8, capacity_scope=Scope.batch, balance_scope=Scope.batch, micro_batches=2
    ),
    "tied, one dense layer, shared expert, top-1": case(tie_embeddings=True, dense_first=1, shared_hidden=16, top_k=1),
    "all tokens to one expert": case(top_k=1, equal_scores=True),
}


PAIRS = [
    (layout, case_name)
    for index, layout in enumerate(LAYOUTS)
    for case_name in {list(CASES)[(index + shift + index // 6) % len(CASES)] for shift in (0, 2)}
]
"""Two cases for each layout, and layouts of all kinds for each case: all of them together take minutes."""


@pytest.mark.fault(13, "every parameter's gradient, fp64, on each layout with data, expert and tensor parallelism and accumulation")
@pytest.mark.parametrize(("layout", "name"), sorted(PAIRS))
def test_layout_gives_the_numbers_of_one_process(ranks, layout: str, name: str) -> None:
    assert_layout_gives_the_numbers_of_one_process(ranks, LAYOUTS[layout], CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_each_case_meets_each_way_to_split(name: str) -> None:
    met = [LAYOUTS[layout] for layout, case_name in PAIRS if case_name == name]
    assert all(any(getattr(layout, degree) > 1 for layout in met) for degree in ("tensor", "shard", "expert"))
    assert {layout for layout, _ in PAIRS} == set(LAYOUTS)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_worth_comparing_with(name: str) -> None:
    expected = reference(CASES[name])
    first = expected["steps"][0]
    assert all(gradient.abs().max() > 0 for name, gradient in expected["gradients"].items() if "experts" not in name)
    assert (first.counts_LE.amin(1) == 0).all(), "no expert without tokens"
    assert (first.balance_L > 0.99).all() and (first.z_L > 0).all()
    assert first.dropped_L.sum() > 0 or CASES[name].config.moe.capacity.factor is None
    assert first.tokens < SEQUENCES * LENGTH
