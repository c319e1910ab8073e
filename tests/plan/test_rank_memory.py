"""The memory of a rank in closed form: that of its dry run, for a few layouts. tests/plan/memory_pairs.py has hundreds."""

import os
from collections.abc import Callable
from typing import Any

import pytest
from dry_steps import facts_of
from memory_pairs import closed, draw, measured
from tokenyard.parallel.vocabulary import LOGITS
from tokenyard.plan.rank_memory import rank_memory
from tokenyard.plan.sized import ends
from tokenyard.plan.sized.operator_sizes import Casts, Group, Sized
from tokenyard.train.config.compose import compose

COMMON = "precision=bf16 sequence_length=2048 batch.micro=1 launch=torchrun launch.ranks=8 launch.nodes={nodes}"
PAIRS = {
    "one device": ("model=granite_3_0_3b_a800m model.layers=2 batch.sequences=2", 1, 0),
    "expert": (
        "model=qwen3_30b_a3b model.layers=2 batch.sequences=16 parallel.expert=8 parallel.recompute=selective "
        "optimizer.states=int8 optimizer.gradients=bf16",
        8,
        0,
    ),
    "folded": (
        "model=deepseek_v2_lite model.layers=2 batch.sequences=8 parallel.tensor=2 parallel.expert=8 parallel.shard=4 "
        "parallel.recompute=block optimizer.offload=true",
        16,
        5,
    ),
    "pipeline": (
        "model=mixtral_8x7b model.layers=4 batch.sequences=32 parallel.pipeline=2 parallel.expert=4 parallel.shard=4",
        16,
        0,
    ),
    "muon": ("model=deepseek_v2_lite model.layers=2 batch.sequences=8 parallel.expert=4 parallel.shard=8 optimizer=muon", 8, 3),
    "exchange": ("model=olmoe_1b_7b model.layers=2 batch.sequences=16 parallel.expert=16 parallel.exchange=deduplicated", 16, 0),
    "fp8": (
        "model=qwen3_30b_a3b model.layers=2 model.vocabulary=1024 batch.sequences=8 model.moe.products=fp8_blockwise "
        "parallel.shard=8",
        8,
        0,
    ),
    "context": ("model=qwen3_30b_a3b model.layers=2 batch.sequences=4 parallel.context=2 parallel.shard=8 parallel.expert=2", 8, 1),
}
FEW = PAIRS if os.environ.get("TOKENYARD_TESTS") == "all" else ["expert", "folded", "pipeline", "muon"]


@pytest.mark.parametrize("name", FEW)
def test_closed_form_is_the_dry_run(apart: Callable[..., Any], name: str) -> None:
    words, world, rank = PAIRS[name]
    words = f"{COMMON.format(nodes=max(1, world // 8))} {words}"
    config = compose(words.split())
    found = rank_memory(config, world, rank * config.parallel.pipeline // world)
    truth = apart(facts_of, words, rank, world)
    assert found.peak == pytest.approx(truth.peak_bytes, rel=0.03)
    assert sum(found.parts.values()) == pytest.approx(found.peak)
    assert found.parts["weights"] == pytest.approx(truth.purposes["weights"], rel=0.001)
    assert found.parts.get("optimizer", 0) == pytest.approx(truth.purposes.get("optimizer", 0), rel=0.005)


@pytest.mark.parametrize(
    "seed",
    [
        *(0, 3, 105),
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 4, 5, 8, 11, 12, 18, 42, 49, 99, 190, 203, 210, 224)),
    ],
)
def test_random_pairs(apart: Callable[..., Any], seed: int) -> None:
    """Of those that are quick: ZeRO-1 with tensor ranks and a deduplicated exchange, zbv with latent attention, and a last stage
    without layers, whose peak is that of its head.
    """
    assert closed(draw(seed)) == pytest.approx(apart(measured, seed), rel=0.03)


@pytest.mark.parametrize(
    ("ranks", "waited", "most", "kept"),
    [
        (2, False, 4 * 800 + 2 * 320 + 4 * 400, 4 * 400),
        (8, False, 2 * 800 + 4 * 800, 4 * 100),
        (8, True, 4 * 800, 4 * 100 - 4 * 800),
    ],
)
def test_a_reduction_has_two_moments(ranks: int, waited: bool, most: int, kept: int) -> None:
    """Of 800 weights, the last of them 320: all narrow gradients and the flat buffer, or the last gradient, the buffer and the
    shards. Narrow ones are added to those that waited, which the stage counted before.
    """
    rank = Sized(1, 2, 4, Casts.gathered, Casts.gathered, first=True)
    rank.waited, gradients = waited, [rank.bytes(2 * 800)]
    rank.reduce_gradients(Group(800, 800 // ranks, 320), gradients)
    assert rank.meter.peak == most
    rank.reduced.clear()
    assert rank.meter.now == kept


def test_gradients_that_wait_are_widened_one_after_the_other() -> None:
    rank = Sized(1, 2, 4, Casts.gathered, Casts.gathered, first=True)
    rank.reduces, gradients = False, [rank.bytes(2 * 800)]
    rank.reduce_gradients(Group(800, 100, 320), gradients)
    assert (rank.meter.peak, rank.meter.now) == (2 * 320 + 4 * 800, 4 * 800)


def test_pairs_are_legal_and_differ() -> None:
    drawn = [draw(seed) for seed in range(6)]
    assert len({pair.words for pair in drawn}) == 6
    assert all(closed(pair) > 0 for pair in drawn)


def test_a_hot_rank_needs_more_and_recomputation_less() -> None:
    words = f"{COMMON.format(nodes=8)} model=qwen3_30b_a3b batch.sequences=64 parallel.expert=8 parallel.shard=64".split()
    even, hot = rank_memory(compose(words), 64), rank_memory(compose(words), 64, hot=1.5)
    assert 1 < hot.peak / even.peak < 1.5
    again = [rank_memory(compose([*words, f"parallel.recompute={mode}"]), 64).peak for mode in ("selective", "block")]
    assert even.peak > again[0] > again[1]


def test_a_pipeline_keeps_fewer_micro_batches_on_later_ranks() -> None:
    words = f"{COMMON.format(nodes=1)} model=mixtral_8x7b batch.sequences=32 parallel.pipeline=8".split()
    kept = [rank_memory(compose(words), 8, rank).parts for rank in (1, 6)]
    assert kept[0]["experts"] / kept[1]["experts"] == pytest.approx(7 / 2)  # 1f1b keeps P - rank micro-batches


@pytest.mark.parametrize("rank", [0, 1])
def test_a_micro_batch_leaves_nothing_behind(rank: int) -> None:
    """The second and later ones of a 1f1b schedule need the same, on the first stage and on the last."""
    words = f"{COMMON.format(nodes=1)} model=mixtral_8x7b model.layers=4 parallel.pipeline=2 parallel.expert=4"
    few, more = (rank_memory(compose([*words.split(), f"batch.sequences={4 * micros}"]), 8, rank).peak for micros in (4, 8))
    assert few == more


def test_chunks_of_logits_are_those_of_the_head() -> None:
    assert LOGITS["cuda"] == ends.LOGITS
