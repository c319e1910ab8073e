"""Dropout draws the masks of one process on every layout and exchange, in fp64: the keys of tokens travel with their rows."""

from typing import Any

import pytest
import torch
from sameness import VOCABULARY, Case, Layout, assert_layout_gives_the_numbers_of_one_process, reference
from tokenyard.moe.config import CapacityConfig, ModelConfig, MoEConfig
from tokenyard.parallel.config import Exchange

LAYOUTS = {
    "recompute": Layout(1, recompute=True),
    "tensor 2 x expert 2, recompute": Layout(4, tensor=2, expert=2, recompute=True),
    "shard 2 x expert 4, 2 chunks": Layout(4, shard=2, expert=4, overlap_chunks=2),
    "deduplicated 4, recompute": Layout(4, expert=4, recompute=True, exchange=Exchange.deduplicated),
    "hierarchical 4, tensor 2, 2 chunks": Layout(
        4, tensor=2, expert=4, exchange=Exchange.hierarchical, node_ranks=2, overlap_chunks=2
    ),
    "gather 2 x expert_tensor 2": Layout(4, expert=2, expert_tensor=2, exchange=Exchange.gather),
    "plain 2 x expert_tensor 2, shard 4, recompute": Layout(4, shard=4, expert=2, expert_tensor=2, recompute=True),
    "expert_tensor 4, tensor 2": Layout(4, tensor=2, expert_tensor=4),
    "context 2 x tensor 2, recompute": Layout(4, context=2, tensor=2, recompute=True),
    "pipeline 2 x context 2 x expert 2": Layout(4, pipeline=2, context=2, expert=2),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_layout_gives_the_numbers_of_one_process(ranks: Any, layout: Layout) -> None:
    """A dense layer, one with experts and a module of multi-token prediction; of the dense one a tensor rank has 6 columns."""
    assert_layout_gives_the_numbers_of_one_process(ranks, layout, case())


@pytest.mark.parametrize("exchange", [Exchange.plain, Exchange.deduplicated])
def test_padding_draws_for_nobody(ranks: Any, exchange: Exchange) -> None:
    padded = case(capacity=CapacityConfig(factor=0.8, pad=True))
    assert_layout_gives_the_numbers_of_one_process(ranks, Layout(4, expert=4, exchange=exchange), padded)


def test_micro_batches_and_ranks_without_tokens(ranks: Any) -> None:
    assert_layout_gives_the_numbers_of_one_process(ranks, Layout(4, tensor=2, expert=2), case(micro_batches=2))
    idle = case(equal_scores=True, idle_rows=2, steps=1)
    assert_layout_gives_the_numbers_of_one_process(ranks, Layout(4, expert=4, exchange=Exchange.gather), idle)


def test_the_reference_drops_inside_and_outside_of_experts() -> None:
    losses = [
        reference(case(dropout=outside, inside=inside))["steps"][0].cross_entropy for outside in (0.0, 0.2) for inside in (0.0, 0.4)
    ]
    assert len(torch.stack(losses).unique()) == 4


def case(dropout: float = 0.2, inside: float = 0.4, capacity: CapacityConfig | None = None, **changes: Any) -> Case:
    moe = MoEConfig(8, 3, 16, shared_hidden=12, bias=True, dropout=inside, capacity=capacity or CapacityConfig())
    sizes: dict[str, Any] = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 4, "hidden": 12, "vocabulary": VOCABULARY}
    return Case(ModelConfig(**sizes, init_std=0.3, dense_first=1, mtp_depth=1, dropout=dropout, moe=moe), **changes)
