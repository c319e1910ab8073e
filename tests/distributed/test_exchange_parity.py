"""Every exchange gives the numbers of one process, in fp64: losses, counts, gradients, weights, with every kind of choice."""

from typing import Any

import pytest
from sameness import VOCABULARY, Case, Layout, assert_layout_gives_the_numbers_of_one_process
from tokenyard.bench.gpu.routers import ROUTERS
from tokenyard.moe.config import ModelConfig, MoEConfig
from tokenyard.parallel.config import Exchange, Overflow

LAYOUTS = {
    "deduplicated 4": Layout(4, expert=4, exchange=Exchange.deduplicated),
    "deduplicated 2, tensor 2, recompute": Layout(4, tensor=2, expert=2, recompute=True, exchange=Exchange.deduplicated),
    "deduplicated 2, shard 4, 2 chunks": Layout(4, shard=4, expert=2, exchange=Exchange.deduplicated, overlap_chunks=2),
    "hierarchical 4, recompute, 3 chunks": Layout(
        4, tensor=2, expert=4, recompute=True, exchange=Exchange.hierarchical, node_ranks=2, overlap_chunks=3
    ),
    "hierarchical on one node": Layout(2, expert=2, exchange=Exchange.hierarchical),
    "gather 4, recompute": Layout(4, shard=2, expert=4, recompute=True, exchange=Exchange.gather),
    "gather 2, 2 chunks": Layout(4, tensor=2, expert=2, exchange=Exchange.gather, overlap_chunks=2),
    "plain 2, shard 4, 2 chunks": Layout(4, shard=4, expert=2, overlap_chunks=2),
    "deduplicated 2 x expert_tensor 2": Layout(4, expert=2, expert_tensor=2, exchange=Exchange.deduplicated),
    "hierarchical 2 x expert_tensor 2, recompute": Layout(
        4, tensor=2, expert=2, expert_tensor=2, recompute=True, exchange=Exchange.hierarchical, node_ranks=2
    ),
    "gather 2 x expert_tensor 2, 2 chunks": Layout(4, expert=2, expert_tensor=2, exchange=Exchange.gather, overlap_chunks=2),
    "symmetric 4, tensor 2, recompute": Layout(4, tensor=2, expert=4, recompute=True, exchange=Exchange.symmetric),
    "symmetric 2 x expert_tensor 2": Layout(4, expert=2, expert_tensor=2, exchange=Exchange.symmetric),
    "symmetric 4 in rounds, shard 2, recompute": Layout(
        4, shard=2, expert=4, recompute=True, exchange=Exchange.symmetric, exchange_rows=0.1, exchange_overflow=Overflow.repair
    ),
}
CHOICES = ("softmax", "deepseek v3", "gshard", "expert choice by batch", "null experts", "padded")
"""Those of all routers that differ in what they hand to the exchange."""


@pytest.mark.fault(13)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_layout_gives_the_numbers_of_one_process(ranks: Any, layout: Layout) -> None:
    assert_layout_gives_the_numbers_of_one_process(ranks, layout, case(ROUTERS["null experts"], shared=True))


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("layout", ["deduplicated 4", "hierarchical 4", "gather 4", "symmetric 4"])
def test_every_kind_of_choice(ranks: Any, layout: str, name: str) -> None:
    exchange = Exchange(layout.partition(" ")[0])
    of_layout = Layout(4, expert=4, exchange=exchange, node_ranks=2 if exchange is Exchange.hierarchical else None)
    assert_layout_gives_the_numbers_of_one_process(ranks, of_layout, case(ROUTERS[name]))


@pytest.mark.fault(27, "all tokens to one rank: no hang, same numbers")
@pytest.mark.parametrize("exchange", [Exchange.deduplicated, Exchange.gather])
def test_equal_logits_and_ranks_without_tokens(ranks: Any, exchange: Exchange) -> None:
    """All tokens choose the same experts, and three of four ranks get none."""
    tied = case(ROUTERS["softmax"], equal_scores=True, idle_rows=2, steps=1)
    assert_layout_gives_the_numbers_of_one_process(ranks, Layout(4, expert=4, exchange=exchange), tied)


def case(moe: MoEConfig, shared: bool = False, **changes: Any) -> Case:
    if shared:
        moe = MoEConfig(**{**vars(moe), "shared_hidden": 16})
    sizes: dict[str, Any] = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 4, "hidden": 24, "vocabulary": VOCABULARY}
    return Case(ModelConfig(**sizes, init_std=0.3, moe=moe), **changes)
