"""The step of a rank as numbers (plan/dry_run.py): closed numbers, what the peak is made of, and where traffic goes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from dry_steps import facts_of
from tokenyard.moe.param_shapes import shapes
from tokenyard.parallel.layout import rank_shapes
from tokenyard.plan.dry_run import StepFacts
from tokenyard.train.config.compose import compose

TINY = "model=tiny_qwen3_moe precision=bf16 sequence_length=256 batch.micro=1"
FOLDED = f"{TINY} batch.sequences=16 parallel.tensor=2 parallel.expert=8 parallel.shard=4"
BLOCK = 512
"""Bytes to which torch's allocator rounds up."""


@pytest.fixture(scope="module")
def one(apart: Callable[..., Any]) -> StepFacts:
    return apart(facts_of, f"{TINY} batch.sequences=2")


@pytest.fixture(scope="module")
def folded(apart: Callable[..., Any]) -> StepFacts:
    return apart(facts_of, FOLDED, 5, 16)


def rounded(sizes: Any) -> int:
    return sum(-(-4 * math.prod(shape) // BLOCK) * BLOCK for shape in sizes)


def test_weights_and_moments_of_one_device(one: StepFacts) -> None:
    """Of fp32, twice that for AdamW, and a counter of steps for each parameter."""
    found = shapes(compose(TINY.split()).model).values()
    assert one.purposes["weights"] == rounded(found)
    assert one.purposes["optimizer"] == 2 * rounded(found) + BLOCK * len(found)
    assert one.kept_bytes == 3 * rounded(found) + BLOCK * len(found)


def test_weights_and_moments_of_a_rank(folded: StepFacts) -> None:
    config = compose(FOLDED.split())
    found = rank_shapes(config.model, config.parallel, 16).values()
    assert folded.purposes["weights"] == rounded(found)
    assert folded.purposes["optimizer"] == 2 * rounded(found) + BLOCK * len(found)


def test_what_the_peak_is_made_of(one: StepFacts, folded: StepFacts) -> None:
    for found in (one, folded):
        assert sum(found.purposes.values()) == sum(found.layers.values()) == found.peak_bytes == max(found.phases.values())
        assert found.purposes.get("other", 0) < 0.03 * found.peak_bytes
    assert "exchange buffers" in folded.purposes
    assert "exchange buffers" not in one.purposes


def test_a_group_inside_a_node_has_its_link(folded: StepFacts) -> None:
    """Of 8 ranks on each node: 8 expert and 2 tensor ranks are neighbours, 4 shards 2 ranks apart, 2 shards of experts 8."""
    links = {(each.kind, each.ranks, each.link) for each in folded.traffic if each.phase in ("forward", "exchange")}
    assert {("alltoall", 8, "in node"), ("allgather", 4, "in node"), ("allreduce", 16, "between nodes")} < links
    assert {link for kind, ranks, link in links if (kind, ranks) == ("allgather", 2)} == {"in node", "between nodes"}


def test_operators_and_host_waits(one: StepFacts, folded: StepFacts) -> None:
    layers = compose(TINY.split()).model.layers
    assert one.operators["attention"] == one.operators["attention_backward"] == 2 * layers
    assert one.operators["grouped_mm"] == 2 * 4 * layers
    assert one.waits == {"flags, loss and norm": 1}
    assert folded.waits == {"flags, loss and norm": 1, "rows of each rank": 2 * layers}
    assert one.launches == sum(one.operators.values())
