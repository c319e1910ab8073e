"""FSDP under the stages of a pipeline: no weight is gathered for nobody, and gradients are reduced when their stage has ended."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from sameness import VOCABULARY, Case, Layout, build, rows_of
from test_zero import Collectives
from tokenyard.moe.config import ModelConfig, MoEConfig
from tokenyard.parallel import gradients
from tokenyard.parallel.apply import Parallel
from tokenyard.parallel.collectives import sum_over
from tokenyard.parallel.config import PipelineSchedule
from tokenyard.parallel.gradients import squared_norm
from tokenyard.parallel.pipeline import run
from tokenyard.parallel.pipeline.schedule import BACKWARD, FORWARD
from tokenyard.train.config.config import Precision
from tokenyard.train.step import StepInput, accumulate, count_totals

MICROS = 4
SIZES: dict[str, Any] = {"layers": 8, "width": 16, "heads": 2, "kv_heads": 2, "vocabulary": VOCABULARY}
CASE = Case(ModelConfig(**SIZES, moe=MoEConfig(experts=4, hidden=8)), MICROS)
GROUPS = 2
"""What FSDP gathers of a block: its experts, if it has some, and the rest."""
SHORTCUT = Case(replace(CASE.config, dense_first=1, moe=replace(CASE.config.moe, shortcut=True)), MICROS)
INTERLEAVED = Layout(
    4, pipeline=2, pipeline_schedule=PipelineSchedule["interleaved"], pipeline_layers=[2, 2, 2, 2], zero=3, shard=2
)


WITHOUT_ENDS = Layout(6, pipeline=3, pipeline_layers=[3, 3, 2], shard=2)
LAYOUTS = {
    "interleaved, zero 1": (INTERLEAVED._replace(zero=1), CASE),
    "interleaved, zero 3": (INTERLEAVED, CASE),
    "a stage without embedding and head": (WITHOUT_ENDS, CASE),
    "a stage without embedding and head, experts on a shortcut": (WITHOUT_ENDS, SHORTCUT),
}


@pytest.mark.parametrize(("layout", "case"), LAYOUTS.values(), ids=LAYOUTS)
def test_each_pass_gathers_what_it_uses(ranks: Any, layout: Layout, case: Case) -> None:
    for found in ranks(layout.world, counted, layout, case):
        assert found["calls"] == found["expected"]


def counted(layout: Layout, case: Case) -> dict[str, Any]:
    """Returns the collectives of FSDP in one step, and how many there are to be.

    With ZeRO-3 each pass gathers its blocks. The root (embedding or head) stays gathered until a backward pass ends.
    """
    parallel = build(layout, case.config)
    with Collectives() as collectives:
        one_pass(parallel)
    assert parallel.pipeline is not None
    root, whole, gathers_of_root = int(not {"embedding.weight", "head.weight"}.isdisjoint(parallel.parameters)), False, 0
    for action in (action for unit in parallel.pipeline.units(MICROS) for action in unit):
        gathers_of_root, whole = gathers_of_root + root * (not whole), action.kind == FORWARD
    groups = root + sum(
        GROUPS if case.config.moe_layer(layer) else 1 for inside in parallel.pipeline.layers.values() for layer in inside
    )
    expected = {"all_gather": groups, "reduce_scatter": groups}
    if layout.zero == 3:
        expected = {"all_gather": 2 * MICROS * (groups - root) + gathers_of_root, "reduce_scatter": MICROS * groups}
    return {"calls": dict(collectives.calls), "expected": expected}


@pytest.mark.parametrize("layout", [INTERLEAVED._replace(shard=1), INTERLEAVED._replace(zero=1)], ids=["replicate", "shard"])
def test_gradients_are_summed_when_their_stage_has_ended(ranks: Any, layout: Layout) -> None:
    """Sums begin in the last backward pass of each stage: in that of the later one, and in that of the first, and in no other."""
    for stages, sums in ranks(4, order, layout):
        ends = {stage: index for index, stage in enumerate(stages)}
        assert ends[max(stages)] < ends[min(stages)] == len(stages) - 1
        assert [index for index, begun in enumerate(sums) if begun] == sorted(ends.values())
        assert min(sums[index] for index in ends.values()) >= 2 * GROUPS


def order(layout: Layout) -> tuple[list[int], list[int]]:
    """Returns the stage of each backward pass, and how many sums over replicas or reduce-scatters began from it to the next."""
    parallel = build(layout, CASE.config)
    assert parallel.pipeline is not None
    stages = [action.stage for unit in parallel.pipeline.units(MICROS) for action in unit if action.kind == BACKWARD]
    sums: list[int] = []
    right_backward, right_start = run._backward, gradients._Bucket.start

    def backward(*arguments: Any) -> None:
        sums.append(-collectives.calls["reduce_scatter"])
        right_backward(*arguments)
        sums[-1] += collectives.calls["reduce_scatter"]

    def start(bucket: Any) -> None:
        sums[-1] += layout.shard == 1
        right_start(bucket)

    patches = (
        mock.patch.object(run, "_backward", backward),
        mock.patch.object(gradients._Bucket, "start", start),
        mock.patch.object(gradients, "BUCKET", 100),
    )
    with ExitStack() as stack, Collectives() as collectives:
        for patch in patches:
            stack.enter_context(patch)
        one_pass(parallel)
    return stages, sums


def one_pass(parallel: Parallel) -> None:
    rows = rows_of(parallel, 0, CASE)
    accumulate(parallel, StepInput(rows, 0.0, None), count_totals(parallel, rows))


@pytest.mark.parametrize("zero", [2, 3])
def test_deferred_gradients_in_bf16_are_those_of_replicas(ranks: Any, zero: int) -> None:
    """On the rank with both ends, FSDP reduces embedding, head and module of prediction together, whose gradients come apart."""
    schedule = PipelineSchedule["zbv"]
    replicas, sharded = (
        ranks(4, narrow_norm, Layout(4, pipeline=2, pipeline_schedule=schedule, shard=shard, zero=zero)) for shard in (1, 2)
    )
    assert sharded == pytest.approx(replicas, rel=1e-4) and replicas[0] > 0


def narrow_norm(layout: Layout) -> float:
    parallel = build(layout, replace(CASE.config, mtp_depth=1), Precision.bf16)
    one_pass(parallel)
    return sum_over(squared_norm(parallel), parallel.mesh.everyone).item()
