"""Every kind of router gives the numbers of one process on several ranks, in fp64; randomness depends on no layout either."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from sameness import VOCABULARY, Case, Layout, assert_close, assert_layout_gives_the_numbers_of_one_process, reference
from tokenyard.bench.gpu.routers import RANDOM, ROUTERS
from tokenyard.moe.config import ModelConfig, MoEConfig, Scope, Selection

LAYOUTS = {
    "tensor 2": Layout(2, tensor=2),
    "expert 4": Layout(4, expert=4),
    "tensor 2 x expert 2, recompute": Layout(4, tensor=2, expert=2, recompute=True),
    "replicate 2 x shard 2": Layout(4, shard=2),
}


PAIRS = [
    (layout, name)
    for index, name in enumerate(ROUTERS)
    for layout in (("tensor 2", "tensor 2 x expert 2, recompute")[index % 2], ("expert 4", "replicate 2 x shard 2")[index // 2 % 2])
]
"""For each router one layout that slices sequences and one that does not."""


@pytest.mark.parametrize(("layout", "name"), PAIRS)
def test_layout_gives_the_numbers_of_one_process(ranks: Any, layout: str, name: str) -> None:
    assert_layout_gives_the_numbers_of_one_process(ranks, LAYOUTS[layout], case(ROUTERS[name]))


@pytest.mark.parametrize("name", ROUTERS)
def test_equal_logits_and_ranks_without_tokens(ranks: Any, name: str) -> None:
    """All choices are ties (after a step only nearly, so rounding would decide); the first data rank has no valid token."""
    tied = case(ROUTERS[name], equal_scores=True, idle_rows=2, steps=1)
    assert_layout_gives_the_numbers_of_one_process(ranks, Layout(4, shard=2, expert=2), tied)


@pytest.mark.parametrize("layout", [Layout(1, recompute=True), Layout(4, tensor=2, expert=2)], ids=["1", "4"])
@pytest.mark.parametrize("name", RANDOM)
def test_accumulation_changes_nothing_that_is_random(ranks: Any, name: str, layout: Layout) -> None:
    """Batch scope is that of a micro-batch, so the scopes are sequences here."""
    config = by_sequence(ROUTERS[name])
    assert_layout_gives_the_numbers_of_one_process(ranks, layout, case(config, micro_batches=2))
    split, whole = reference(case(config, micro_batches=2)), reference(case(config))
    for key, value in split["weights"].items():
        assert_close(value, whole["weights"][key], key)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_reference_is_worth_comparing_with(name: str) -> None:
    moe, (first, *_) = ROUTERS[name], reference(case(ROUTERS[name]))["steps"]
    gradients = reference(case(ROUTERS[name]))["gradients"]
    routers = {key: gradient for key, gradient in gradients.items() if "router" in key}
    assert bool(routers) == (moe.router.selection is not Selection.hash)
    assert all(gradient.abs().max() > 0 for gradient in routers.values())
    limited = moe.capacity.factor_at(1) is not None and moe.router.selection is not Selection.expert_choice
    assert (first.dropped_L > 0).all() == limited
    assert (first.importance_L > 0).all() == (moe.balance.importance_coefficient > 0)
    assert (first.device_L > 0).all() == (moe.balance.device_coefficient > 0)
    assert (first.communication_L > 0).all() == (moe.balance.communication_coefficient > 0)
    assert (first.sequence_L > 0).all() == (moe.balance.sequence_coefficient > 0)
    biases = [value for key, value in reference(case(moe))["weights"].items() if key.endswith("expert_bias")]
    assert len(biases) == (2 if moe.balance.bias_rate > 0 else 0)
    assert all(torch.unique(bias.abs()).numel() > 1 for bias in biases)


def case(moe: MoEConfig, **changes: Any) -> Case:
    sizes: dict[str, Any] = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 4, "hidden": 24, "vocabulary": VOCABULARY}
    return Case(ModelConfig(**sizes, init_std=0.3, moe=moe), **changes)


def by_sequence(moe: MoEConfig) -> MoEConfig:
    return replace(moe, balance=replace(moe.balance, scope=Scope.sequence), capacity=replace(moe.capacity, scope=Scope.sequence))
