"""Compiled stages of a pipeline and compiled context ranks give the losses and gradients of eager ones, in fp64."""

import functools
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from sameness import VOCABULARY, Case, Layout, assert_close, configured, rows_of
from tokenyard.moe.config import AttentionConfig, BalanceConfig, ModelConfig, MoEConfig
from tokenyard.parallel.apply import gradient_of
from tokenyard.parallel.config import ContextExchange, PipelineSchedule
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
KINDS = {"norm", "causal attention", "attention with a window", "dense feed-forward", "experts"}
LAYOUTS = {
    "interleaved": Layout(2, pipeline=2, pipeline_schedule=PipelineSchedule["interleaved"]),
    "experts": Layout(2, expert=2),
    "FSDP": Layout(2, shard=2),
    "context": Layout(2, context=2),
    "context, heads": Layout(2, context=2, context_exchange=ContextExchange.heads),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_ranks_give_the_numbers_of_eager_ones(ranks: Any, layout: str) -> None:
    """Each kind of module is one graph, collectives of attention included. Generating code is left out: it takes a minute."""
    for eager, compiled, graphs in ranks(2, both_made, LAYOUTS[layout], limit_seconds=480):
        assert_close(compiled[0], eager[0], "objective")
        for name, expected in eager[1].items():
            assert_close(compiled[1][name], expected, name)
        assert 1 <= graphs <= len(KINDS)  # a block is one graph in a pipeline, and a rank may have one kind


def both_made(layout: Layout) -> Any:
    """Returns eager and compiled results, and the number of compiled graphs."""
    from torch._dynamo.utils import counters  # imports the compiler

    torch.compiler.reset()
    counters.clear()
    eager, compiled = (made(layout, compiled) for compiled in (False, True))
    assert not counters["graph_break"] and not counters["unimplemented"], counters
    return eager, compiled, counters["stats"]["unique_graphs"]


def made(layout: Layout, compiled: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the objective of this rank and its gradients, of two micro-batches."""
    config = replace(configured(layout, CASE), compile=compiled)
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        parallel = build_parallel(config, torch.device("cpu"))
    rows = rows_of(parallel, 0, CASE)
    shares = accumulate(parallel, StepInput(rows, 0.0, None), count_totals(parallel, rows))
    gradients = {name: gradient_of(each).clone() for name, each in parallel.parameters.items()}
    return torch.stack([share.objective.detach() for share in shares]).sum(), gradients
