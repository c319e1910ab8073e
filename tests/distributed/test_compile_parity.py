"""Compiled stages of a pipeline and compiled context ranks give the numbers of eager ones and of one process, in fp64."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from sameness import VOCABULARY, Case, Layout, assert_close, configured, reference, rows_of, starve_expert
from tokenyard.moe.config import AttentionConfig, BalanceConfig, ModelConfig, MoEConfig, Products
from tokenyard.moe.deferred import WeightGradient, add_weight_gradients
from tokenyard.parallel.apply import Parallel, gradient_of
from tokenyard.parallel.config import ContextExchange, ExchangeDtype, PipelineSchedule
from tokenyard.parallel.pipeline import run
from tokenyard.train.setup import build_parallel
from tokenyard.train.step import StepInput, accumulate, count_totals
from torch import Tensor

MOE = MoEConfig(experts=8, hidden=16, z_coefficient=0.01, balance=BalanceConfig(coefficient=0.05, sequence_coefficient=0.02))
SIZES: dict[str, Any] = {"layers": 3, "width": 16, "heads": 4, "kv_heads": 2, "vocabulary": VOCABULARY, "init_std": 0.3}
CASE = Case(
    ModelConfig(**SIZES, moe=MOE, dense_first=1, mtp_depth=1, attention=AttentionConfig(window=5, window_every=2)),
    micro_batches=2,
    length=16,
)
FP8 = Case(
    ModelConfig(
        **{**SIZES, "layers": 2, "width": 160, "hidden": 96, "init_std": 0.1},
        products=Products.fp8_blockwise,
        moe=replace(MOE, hidden=48, shared_hidden=32, products=Products.fp8_blockwise),
        dense_first=1,
    ),
    micro_batches=2,
    length=16,
    exchange_dtype=ExchangeDtype.fp8,
)
KINDS = {"norm", "causal attention", "attention with a window", "dense feed-forward", "experts"}
PIECES = {"norm", "rotated queries", "rotated keys", "causal attention", "attention with a window"}
"""What is compiled where products of weights are not."""
LAYOUTS = {
    "interleaved": Layout(2, pipeline=2, pipeline_schedule=PipelineSchedule["interleaved"]),
    "experts": Layout(2, expert=2),
    "FSDP": Layout(2, shard=2),
    "context": Layout(2, context=2),
    "context, heads": Layout(2, context=2, context_exchange=ContextExchange.heads),
}
ZERO_BUBBLE = {
    "zbh1": Layout(2, pipeline=2, pipeline_schedule=PipelineSchedule["zbh1"]),
    "zbv, zero 3, recompute, passes side by side": Layout(
        4, pipeline=2, expert=2, shard=2, recompute=True, pipeline_overlap=True, pipeline_schedule=PipelineSchedule["zbv"]
    ),
}


IN_FP8 = {"one process": Layout(1), "context and experts": Layout(2, context=2, expert=2)}


class Made(NamedTuple):
    """What a step makes on this rank."""

    objective: Tensor
    gradients: dict[str, Tensor]
    deferred: list[list[tuple[int, ...]]]
    """The shapes of the weights whose gradients were deferred, for each action that computes such gradients."""


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_ranks_give_the_numbers_of_eager_ones(ranks: Any, layout: str) -> None:
    """Each kind of module is one graph, collectives of attention included. Generating code is left out: it takes a minute."""
    for eager, compiled, graphs, breaks in ranks_make(ranks, LAYOUTS[layout]):
        assert_same(compiled, eager)
        assert 1 <= graphs[0] == graphs[1] <= len(KINDS)  # a block is one graph in a pipeline, and a rank may have one kind
        assert not breaks, breaks


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("layout", IN_FP8)
def test_compiled_products_in_fp8_give_the_numbers_of_eager_ones(ranks: Any, layout: str) -> None:
    """Tokens travel in FP8 too. One process has a graph for each kind of block."""
    for eager, compiled, graphs, breaks in ranks_make(ranks, IN_FP8[layout], FP8):
        assert_same(compiled, eager)
        assert 2 <= graphs[0] == graphs[1] <= len(KINDS)
        assert not breaks, breaks


@pytest.mark.slow
@pytest.mark.parametrize("layout", ZERO_BUBBLE)
def test_compiled_stages_defer_the_gradients_that_eager_ones_defer(ranks: Any, layout: str) -> None:
    """Graphs end at products of weights, and at nothing else."""
    for eager, compiled, graphs, breaks in ranks_make(ranks, ZERO_BUBBLE[layout]):
        assert_same(compiled, eager)
        assert compiled.deferred == eager.deferred and eager.deferred and all(eager.deferred)
        assert 2 <= graphs[0] == graphs[1] <= len(PIECES)
        assert breaks and all("Linear.forward" in each for each in breaks), breaks


def ranks_make(ranks: Any, layout: Layout, case: Case = CASE) -> Any:
    one_process = reference(case)["gradients"]
    if layout.world == 1:
        return [both_made(layout, case, one_process)]
    return ranks(layout.world, both_made, layout, case, one_process, limit_seconds=480)


def assert_same(made: Made, expected: Made) -> None:
    assert_close(made.objective, expected.objective, "objective")
    for name, gradient in expected.gradients.items():
        assert_close(made.gradients[name], gradient, name)


def both_made(layout: Layout, case: Case, one_process: dict[str, Tensor]) -> tuple[Made, Made, list[int], list[str]]:
    """Returns eager and compiled results, the number of compiled graphs after each of two steps, and why graphs ended."""
    from torch._dynamo.utils import counters  # imports the compiler

    torch.compiler.reset()
    counters.clear()
    eager, parallel = made(parallel_of(layout, case, False), case), parallel_of(layout, case, True)
    compiled, graphs = made(parallel, case), [counters["stats"]["unique_graphs"]]
    assert_same(made(parallel, case), compiled)
    graphs.append(counters["stats"]["unique_graphs"])
    for name, sharded in parallel.parameters.items():
        assert_close(compiled.gradients[name], sharded.metadata.cut(one_process[name]), name)
    return eager, compiled, graphs, [*counters["graph_break"], *counters["unimplemented"]]


def parallel_of(layout: Layout, case: Case, compiled: bool) -> Parallel:
    config = replace(configured(layout, case), compile=compiled)
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        parallel = build_parallel(config, torch.device("cpu"))
    starve_expert(parallel)
    return parallel


def made(parallel: Parallel, case: Case) -> Made:
    """Returns the objective of this rank, its gradients, and those that were deferred, of two micro-batches."""
    deferred: list[list[tuple[int, ...]]] = []

    def noted(gradients: list[WeightGradient]) -> None:
        deferred.append([tuple(gradient.weight.shape) for gradient in gradients])
        add_weight_gradients(gradients)

    rows = rows_of(parallel, 0, case)
    with mock.patch.object(run, "add_weight_gradients", noted):
        shares = accumulate(parallel, StepInput(rows, 0.0, None), count_totals(parallel, rows))
    gradients = {name: gradient_of(each).clone() for name, each in parallel.parameters.items()}
    parallel.model.zero_grad()
    return Made(torch.stack([share.objective.detach() for share in shares]).sum(), gradients, deferred)
