"""Gradients in bf16: on every layout those of one process, rounded as often as a layout rounds, and the update takes them wide."""

from typing import Any, NamedTuple

import pytest
import torch
from sameness import Case, Layout, configured, rows_of
from tokenyard.moe.config import ModelConfig, MoEConfig
from tokenyard.parallel.apply import Parallel, gradient_of
from tokenyard.parallel.config import PipelineSchedule
from tokenyard.parallel.layout import stays_whole
from tokenyard.parallel.shard import ShardMetadata
from tokenyard.train.batch import Rows
from tokenyard.train.config.config import GradientDtype
from tokenyard.train.engine import Engine
from tokenyard.train.setup import build_engine, build_parallel
from tokenyard.train.step import StepInput, accumulate, count_totals
from torch import Tensor

MODEL = ModelConfig(
    layers=2, width=16, heads=4, kv_heads=2, hidden=16, vocabulary=40, dense_first=1, moe=MoEConfig(experts=4, top_k=2, hidden=16)
)
MICRO_BATCHES = 2
HALF = 2**-8
"""The largest relative error of a rounding to bf16."""
LAYOUTS = {
    "replicate 2": Layout(2),
    "expert 2 x tensor 2": Layout(4, tensor=2, expert=2),
    "shard 2": Layout(2, shard=2),
    "shard 2 of 4, zero 1": Layout(4, shard=2, expert=2, zero=1),
    "zbh1 over shard 2": Layout(4, pipeline=2, shard=2, pipeline_schedule=PipelineSchedule.zbh1),
}


class Made(NamedTuple):
    """Of a rank."""

    gradients: dict[str, tuple[ShardMetadata, int, Tensor]]
    """Of two micro-batches, with the number of replicas."""
    norm: Tensor


def made(layout: Layout, kept: GradientDtype) -> Made:
    """The products are in fp64, so roundings to bf16 are the only ones to see."""
    parallel, engine, rows = begun(layout, kept)
    accumulate(parallel, StepInput(rows, 0.0, None), count_totals(parallel, rows))
    held = {name: (one.metadata, one.replicas.size, gradient_of(one).clone()) for name, one in parallel.parameters.items()}
    return Made(held, engine.step(StepInput(rows, 0.01, 0.1)).gradient_norm)


def begun(layout: Layout, kept: GradientDtype) -> tuple[Parallel, Engine, list[Rows]]:
    case = Case(MODEL, micro_batches=MICRO_BATCHES)
    config = configured(layout, case)
    config.optimizer.gradients = kept
    parallel = build_parallel(config, torch.device("cpu"))
    return parallel, build_engine(config, parallel), rows_of(parallel, 0, case)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_one_process_rounded(ranks: Any, name: str) -> None:
    exact, layout = made(Layout(1), GradientDtype.fp32), LAYOUTS[name]
    for found in ranks(layout.world, made, layout, GradientDtype.bf16):
        for each, (metadata, replicas, gradient) in found.gradients.items():
            wanted = metadata.cut(exact.gradients[each][2])
            if stays_whole(each, len(metadata.shape)):
                torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12, msg=each)
                continue
            assert gradient.dtype == torch.bfloat16
            error, roundings = (gradient.double() - wanted).norm(), MICRO_BATCHES + replicas  # of each term, and each partial sum
            assert 0 < error <= roundings * HALF * wanted.norm(), each
        torch.testing.assert_close(found.norm, exact.norm, rtol=4 * HALF, atol=0)


def test_norm_clipping_and_update_are_wide() -> None:
    parallel, engine, rows = begun(Layout(1), GradientDtype.bf16)
    accumulate(parallel, StepInput(rows, 0.0, None), count_totals(parallel, rows))
    gradients = {name: gradient_of(one).double() for name, one in parallel.parameters.items()}
    weights = {name: one.parameter.detach().clone() for name, one in parallel.parameters.items()}
    norm = engine.step(StepInput(rows, 0.01, 0.1)).gradient_norm
    torch.testing.assert_close(norm, torch.stack([gradient.norm() for gradient in gradients.values()]).norm(), rtol=1e-6, atol=0)
    for name, one in parallel.parameters.items():
        clipped = gradients[name] * 0.1 / (norm + 1e-6)
        narrow = gradient_of(one)
        torch.testing.assert_close(narrow.double(), clipped, rtol=1.01 * HALF, atol=0, msg=name)  # one rounding
        decay = 0.1 if one.parameter.ndim > 1 else 0.0
        step = narrow.double() / (narrow.double().abs() + 1e-6)
        torch.testing.assert_close(one.parameter, weights[name] * (1 - 0.01 * decay) - 0.01 * step, rtol=0, atol=1e-12, msg=name)
