"""Each known mistake of distributed MoE training is found, and named: the first tensor that differs, and what it looks like."""

from functools import cache
from typing import Any

import bugs
import pytest
from sameness import verdict_of
from tokenyard.parallel.config import ParallelConfig, Recompute
from tokenyard.parallel.mesh import build_mesh
from tokenyard.parity.choose_layouts import Layout, prepare_config
from tokenyard.parity.command import common_causes, explained
from tokenyard.parity.compare import Reference, compare, reference_of
from tokenyard.parity.diagnose import Verdict, layer_of
from tokenyard.parity.finding import Finding
from tokenyard.parity.observe import observe
from tokenyard.parity.rank_worker import without_auxiliary
from tokenyard.parity.shrink import shrink
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config

EXPERT = [Layout(2, ParallelConfig(expert=2)), Layout(4, ParallelConfig(expert=4)), Layout(4, ParallelConfig(tensor=4, expert=2))]
TENSOR = [Layout(2, ParallelConfig(tensor=2)), Layout(4, ParallelConfig(tensor=2, shard=2))]
CONTEXT = [
    Layout(2, ParallelConfig(context=2)),
    Layout(4, ParallelConfig(context=4)),
    Layout(4, ParallelConfig(context=2, tensor=2)),
]
PIPELINE = [Layout(2, ParallelConfig(pipeline=2), 2), Layout(4, ParallelConfig(pipeline=2, tensor=2), 2)]
DEEP = [Layout(2, ParallelConfig(pipeline=2), 2), Layout(4, ParallelConfig(pipeline=4), 2)]
DATA = [Layout(2), Layout(4, ParallelConfig(tensor=2, expert=4)), Layout(4, ParallelConfig(shard=4))]
CASES = {
    "averaged_over_expert_ranks": (EXPERT, "gradient", "mtp.0.block.moe.experts.down", "1 / parallel.expert", "exactly 1/{expert}"),
    "averaged_over_context_ranks": (
        CONTEXT,
        "gradient",
        "mtp.0",
        "1 / parallel.context",
        "exactly 1/{context}",
    ),
    "chunks_rotated_as_if_neighbours": (CONTEXT, "output", "layers.0.attention", "context chunks", "positions of other chunks"),
    "chunk_of_keys_forgotten": (CONTEXT, "output", "layers.0.attention", "context chunks", "without the keys of one"),
    "clipped_by_own_norm": (EXPERT, "gradient", "", "clipping", "clipped by the rank's own norm"),
    "auxiliary_divided_by_data_ranks": (
        DATA,
        "gradient",
        "mtp.0.block.moe",
        "1 / data ranks",
        "z-loss is exactly",
    ),
    "router_not_added_up_over_tensor_ranks": (
        TENSOR,
        "gradient",
        "mtp.0.block.moe.router.weight",
        "not added up over tensor",
        "not summed over the tensor ranks",
    ),
    "bias_moved_per_micro_batch": (
        [Layout(1, accumulation=2), Layout(2, ParallelConfig(expert=2), 2)],
        "",
        "layers.1.moe",
        "bias per micro-batch",
        "per micro-batch",
    ),
    "auxiliary_forgotten_by_a_stage": (PIPELINE, "gradient", "layers.1.", "a stage's own losses", "leave its own balance losses"),
    "micro_batch_counted_twice_in_a_pipeline": (DEEP, "count per expert", "layers.1.moe", "micro-batches", "exactly 2 times"),
    "tied_weight_updated_by_each_stage": (
        PIPELINE,
        "gradient",
        "embedding.weight",
        "not added up over pipeline",
        "not summed over the pipeline ranks",
    ),
    "averaged_over_stages": ([DEEP[1], PIPELINE[1]], "gradient", "mtp.0.", "1 / parallel.pipeline", "exactly 1/{pipeline}"),
    "counts_again_in_recomputation": (
        [
            Layout(1, ParallelConfig(recompute=Recompute.block)),
            Layout(4, ParallelConfig(expert=2, tensor=2, recompute=Recompute.block)),
        ],
        "count per expert",
        "layers.1.moe",
        "forward passes with recomputation",
        "exactly 2 times",
    ),
}
"""Layouts that have the bug; kind and name of the first tensor that differs; the cause, and words of the hint."""


@pytest.mark.parametrize("bug", CASES)
def test_the_bug_is_named(ranks: Any, bug: str) -> None:
    layouts, kind, name, cause, words = CASES[bug]
    verdicts = [verdict_with(ranks, layout, bug) for layout in layouts]
    for layout, verdict in zip(layouts, verdicts, strict=True):
        assert verdict.first is not None and not verdict.equal
        assert kind in verdict.first.kind and verdict.first.name.startswith(name)
        assert layer_of(verdict.first.name) in ("mtp module 0", "layer 0", "layer 1", "")
        assert verdict.first.difference > 1e-9 and verdict.first.ranks
        text = " ".join(" ".join(explained(verdict, {cause})).split())
        degrees = {"expert": layout.parallel.expert, "context": layout.parallel.context, "pipeline": layout.parallel.pipeline}
        assert words.format(**degrees) in text, text
    assert common_causes(verdicts) == {cause}


def test_without_a_bug_they_are_equal(ranks: Any) -> None:
    layouts = {layout.text: layout for layouts, *_ in CASES.values() for layout in layouts}
    for layout in layouts.values():
        verdict = verdict_with(ranks, layout, None)
        assert verdict.equal, explained(verdict, set())


def test_a_layout_without_expert_parallelism_does_not_have_the_bug_of_it(ranks: Any) -> None:
    assert verdict_with(ranks, Layout(2), "averaged_over_expert_ranks").equal


def verdict_with(ranks: Any, layout: Layout, bug: str | None) -> Verdict:
    config, expected = layout.applied(small()), expected_of_one_process()
    answers = [found(config, expected, bug)] if layout.ranks == 1 else ranks(layout.ranks, found, config, expected, bug)
    return verdict_of(layout, answers)


def found(config: Config, expected: Reference, bug: str | None) -> tuple[list[Finding], dict[str, int]]:
    """On a rank."""
    with getattr(bugs, bug)() if bug else bugs.contextlib.nullcontext():
        return compare(observe(config, 1), expected), build_mesh(config.parallel).sizes


@cache
def small() -> Config:
    config = shrink(prepare_config(compose(["model=tiny_deepseek_v3", "model.moe.balance.bias_rate=0.05"])), 4)
    config.optimizer.clip_norm = 0.01
    return config


@cache
def expected_of_one_process() -> Reference:
    return reference_of(observe(small(), 1), observe(without_auxiliary(small()), 1))
