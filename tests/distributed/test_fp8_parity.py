"""Products in FP8, and tokens that travel in FP8, give the same numbers on every layout: those of one process, in fp64."""

from dataclasses import replace
from typing import Any

import pytest
from sameness import VOCABULARY, Case, Layout, assert_layout_gives_the_numbers_of_one_process, reference
from tokenyard.moe.config import BalanceConfig, ModelConfig, MoEConfig, Products
from tokenyard.parallel.config import ContextExchange, Exchange, ExchangeDtype, PipelineSchedule, Recompute

WITHIN = {
    "one process, selective": Layout(1, recompute=Recompute.selective),
    "expert 4": Layout(4, expert=4),
    "deduplicated 2, shard 2, zero 3, 2 chunks": Layout(2, expert=2, shard=2, exchange=Exchange.deduplicated, overlap_chunks=2),
    "shard 2, zero 1, recompute": Layout(2, shard=2, zero=1, recompute=True),
    "pipeline 2, zbh1, expert 2, shard 2, zero 2": Layout(
        4, pipeline=2, pipeline_schedule=PipelineSchedule["zbh1"], expert=2, shard=2, zero=2
    ),
    "context 2": Layout(2, context=2),
    "context 2, heads, expert 2, shard 2": Layout(2, context=2, context_exchange=ContextExchange.heads, expert=2, shard=2),
}
"""Layouts that cut no operand."""
CUTTING = {
    "tensor 2 x expert 2": Layout(2, tensor=2, expert=2),
    "expert 2 x expert_tensor 2": Layout(4, expert=2, expert_tensor=2),
    "context 2, tensor 2": Layout(4, context=2, tensor=2),
    "pipeline 2, zbv, tensor 2": Layout(4, pipeline=2, pipeline_schedule=PipelineSchedule["zbv"], tensor=2),
}
"""Layouts that cut operands, between blocks."""


TRAVELLING = {
    "expert 4, selective": Layout(4, expert=4, recompute=Recompute.selective),
    "deduplicated 2, shard 2, 2 chunks": Layout(2, expert=2, shard=2, exchange=Exchange.deduplicated, overlap_chunks=2),
    "hierarchical 4, recompute": Layout(4, expert=4, exchange=Exchange.hierarchical, node_ranks=2, recompute=True),
    "gather 2, tensor 2": Layout(4, expert=2, tensor=2, exchange=Exchange.gather),
    "expert 2 x expert_tensor 2": Layout(4, expert=2, expert_tensor=2),
    "pipeline 2, zbh1, expert 2": Layout(4, pipeline=2, pipeline_schedule=PipelineSchedule["zbh1"], expert=2),
    "replicate 2": Layout(2),
    "context 2, expert 2": Layout(2, context=2, expert=2),
}


def case(products: Products, exchange_dtype: ExchangeDtype = ExchangeDtype.wide) -> Case:
    moe = MoEConfig(
        experts=8, hidden=256, shared_hidden=128, products=products, z_coefficient=0.01, balance=BalanceConfig(coefficient=0.05)
    )
    model = ModelConfig(
        layers=3, width=128, heads=4, head_width=64, hidden=256, vocabulary=VOCABULARY, dense_first=1, init_std=0.1, moe=moe
    )
    return Case(replace(model, kv_heads=4, products=products), micro_batches=2, exchange_dtype=exchange_dtype)


CASES = [
    *((Products.fp8_blockwise, name) for name in [*WITHIN, *CUTTING]),
    *((Products.mxfp8, name) for name in ("expert 4", "context 2", "tensor 2 x expert 2", "expert 2 x expert_tensor 2")),
    *((Products.fp8_rowwise, name) for name in ("one process, selective", "deduplicated 2, shard 2, zero 3, 2 chunks")),
]


@pytest.mark.parametrize(("products", "layout"), CASES, ids=lambda each: getattr(each, "value", each))
def test_products_are_those_of_one_process(ranks: Any, products: Products, layout: str) -> None:
    assert_layout_gives_the_numbers_of_one_process(ranks, (WITHIN | CUTTING)[layout], case(products))


@pytest.mark.parametrize("layout", TRAVELLING)
def test_tokens_that_travel_are_those_of_one_process(ranks: Any, layout: str) -> None:
    travelling = case(Products.wide, ExchangeDtype.fp8)
    assert_layout_gives_the_numbers_of_one_process(ranks, TRAVELLING[layout], travelling)


def test_the_references_differ() -> None:
    cases = [*map(case, Products), case(Products.wide, ExchangeDtype.fp8)]
    losses = {reference(each)["steps"][0].cross_entropy.item() for each in cases}
    assert len(losses) == len(cases) and max(losses) - min(losses) < 0.01 * min(losses)
