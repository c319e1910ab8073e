"""Products in FP8, and tokens that travel in FP8, give the same numbers on every layout: those of one process, in fp64."""

from dataclasses import replace
from typing import Any

import pytest
from sameness import VOCABULARY, Case, Layout, assert_layout_gives_the_numbers_of_one_process, reference
from tokenyard.moe.config import BalanceConfig, ModelConfig, MoEConfig, Products
from tokenyard.parallel.config import Exchange, PipelineSchedule, Recompute

WITHIN = {
    "one process, selective": Layout(1, recompute=Recompute.selective),
    "expert 4": Layout(4, expert=4),
    "deduplicated 2, shard 2, zero 3, 2 chunks": Layout(2, expert=2, shard=2, exchange=Exchange.deduplicated, overlap_chunks=2),
    "shard 2, zero 1, recompute": Layout(2, shard=2, zero=1, recompute=True),
    "pipeline 2, zbh1, expert 2, shard 2, zero 2": Layout(
        4, pipeline=2, pipeline_schedule=PipelineSchedule["zbh1"], expert=2, shard=2, zero=2
    ),
}
"""Layouts that cut no operand."""
CUTTING = {
    "tensor 2 x expert 2": Layout(2, tensor=2, expert=2),
    "expert 2 x expert_tensor 2": Layout(4, expert=2, expert_tensor=2),
    "pipeline 2, zbv, tensor 2": Layout(4, pipeline=2, pipeline_schedule=PipelineSchedule["zbv"], tensor=2),
}
"""Layouts that cut operands, between blocks."""


def case(products: Products) -> Case:
    moe = MoEConfig(
        experts=8, hidden=256, shared_hidden=128, products=products, z_coefficient=0.01, balance=BalanceConfig(coefficient=0.05)
    )
    model = ModelConfig(
        layers=3, width=128, heads=4, head_width=64, hidden=256, vocabulary=VOCABULARY, dense_first=1, init_std=0.1, moe=moe
    )
    return Case(replace(model, kv_heads=4, products=products), micro_batches=2)


CASES = [
    *((Products.fp8_blockwise, name) for name in [*WITHIN, *CUTTING]),
    *((Products.mxfp8, name) for name in ("expert 4", "tensor 2 x expert 2", "expert 2 x expert_tensor 2")),
    *((Products.fp8_rowwise, name) for name in ("one process, selective", "deduplicated 2, shard 2, zero 3, 2 chunks")),
]


@pytest.mark.parametrize(("products", "layout"), CASES, ids=lambda each: getattr(each, "value", each))
def test_products_are_those_of_one_process(ranks: Any, products: Products, layout: str) -> None:
    assert_layout_gives_the_numbers_of_one_process(ranks, (WITHIN | CUTTING)[layout], case(products))


def test_the_references_differ() -> None:
    losses = {reference(case(products))["steps"][0].cross_entropy.item() for products in Products}
    assert len(losses) == len(Products) and max(losses) - min(losses) < 0.01 * min(losses)
