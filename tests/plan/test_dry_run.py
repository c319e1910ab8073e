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


WINDOWS = "model=tiny_gpt_oss precision=bf16 sequence_length=256 batch.micro=1 model.layers=20 parallel.shard=8"
STAGES = (
    "model=tiny_deepseek_v3 precision=bf16 sequence_length=256 batch.micro=1 model.layers=24 parallel.pipeline=2 parallel.expert=2 "
    "parallel.shard=2 parallel.zero=1 parallel.exchange=deduplicated"
)


@pytest.mark.parametrize(("words", "world"), [(f"{WINDOWS} batch.sequences=8", 8), (f"{STAGES} batch.sequences=14", 4)])
def test_layers_and_micro_batches_that_follow(words: str, world: int, apart: Callable[..., Any]) -> None:
    """Of few layers and micro-batches follows what all of them take, to the operator and to the byte.

    Apart from results of a number or a few for each layer and micro-batch, which are rounded up to blocks.
    """
    auto, full = (apart(facts_of, words, 0, world, in_full) for in_full in (False, True))
    assert auto.points.keys() < full.points.keys()
    assert auto.peak_point == full.peak_point
    assert auto.kept_bytes == full.kept_bytes
    few = 3 * compose(words.split()).model.layers * BLOCK
    assert auto.purposes == {purpose: pytest.approx(size, abs=few) for purpose, size in full.purposes.items()}
    assert auto.traffic == full.traffic
    assert (auto.operators, auto.waits) == (full.operators, full.waits)


def test_a_stage_keeps_nothing_of_micro_batches_that_are_done(apart: Callable[..., Any]) -> None:
    """Messages leave, and results of a micro-batch are a few numbers, without the plans of the exchange in its graph."""
    words = f"{TINY} model.layers=4 parallel.pipeline=2 parallel.expert=2 parallel.exchange=deduplicated"
    few, many = (apart(facts_of, f"{words} batch.sequences={2 * micro_batches}", 0, 4) for micro_batches in (3, 6))
    grown = {purpose: size - few.purposes.get(purpose, 0) for purpose, size in many.purposes.items()}
    assert 0 < grown.pop("other") < 3 * 40 * BLOCK
    assert not any(grown.values())


def test_a_hot_rank_receives_more(apart: Callable[..., Any]) -> None:
    """Half as many rows again, in the exchange of rows (bf16) and not in that of counts; and no less memory."""
    words = f"{TINY} batch.sequences=8 parallel.expert=4 model.moe.hidden=2048"
    even, hot = (apart(facts_of, words, 0, 4, False, load) for load in (1.0, 1.5))
    sent = [{(each.phase, each.dtype): each.bytes for each in found.traffic if each.kind == "alltoall"} for found in (even, hot)]
    assert sent[1] == {key: size * 1.5 if key[1] == "bfloat16" else size for key, size in sent[0].items()}
    experts = [found.purposes["activations: experts"] for found in (even, hot)]
    assert 1.4 * experts[0] < experts[1] <= 1.5 * experts[0], "at the peak there are gradients of their weights, too"


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
        assert found.peak_bytes == sum(found.purposes.values()) == max(sum(each.values()) for each in found.points.values())
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


def test_tokens_in_e4m3_are_counted_as_they_travel(apart: Callable[..., Any]) -> None:
    """In products in FP8, too, the host waits for nothing."""
    words = f"{TINY} batch.sequences=2 parallel.expert=2"
    wide, narrow = (
        apart(facts_of, each, 0, 2)
        for each in (words, f"{words} parallel.exchange_dtype=fp8 model.products=mxfp8 model.moe.products=fp8_rowwise")
    )
    c, rows = compose(words.split()).model, 256 * compose(words.split()).model.moe.top_k
    sent = {each.dtype: each.bytes for each in narrow.traffic if (each.phase, each.kind) == ("forward", "alltoall")}
    before = {each.dtype: each.bytes for each in wide.traffic if (each.phase, each.kind) == ("forward", "alltoall")}
    layers = sum(map(c.moe_layer, range(c.layers)))
    assert sent["uint8"] == layers * rows * (c.width + -(-c.width // 128))
    assert before["bfloat16"] - sent["bfloat16"] == layers * rows * 2 * c.width
    assert narrow.waits == wide.waits
