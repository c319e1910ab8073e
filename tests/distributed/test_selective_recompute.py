"""parallel.recompute=selective and offload change no bit of a gradient on any layout, in fp64, and send nothing twice."""

from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from sameness import VOCABULARY, Case, Layout, build, rows_of, starve_expert
from tokenyard.moe.config import (
    AttentionConfig,
    AttentionKind,
    BalanceConfig,
    CapacityConfig,
    DeltaNetConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    QKNorm,
    Scope,
)
from tokenyard.parallel import offload
from tokenyard.parallel.apply import initialise, local
from tokenyard.parallel.config import ContextExchange, Exchange, PipelineSchedule, Recompute
from tokenyard.train.config.config import OptimizerConfig
from tokenyard.train.optimizer import build_optimizer
from tokenyard.train.step import StepInput, train_step
from torch.utils._python_dispatch import TorchDispatchMode

LAYOUTS = {
    "plain 4, tensor 2, 2 chunks": Layout(4, tensor=2, expert=4, overlap_chunks=2),
    "plain 2 x expert_tensor 2, shard 4": Layout(4, shard=4, expert=2, expert_tensor=2),
    "deduplicated 2 x expert_tensor 2": Layout(4, expert=2, expert_tensor=2, exchange=Exchange.deduplicated),
    "hierarchical 4, tensor 2, 2 chunks": Layout(
        4, tensor=2, expert=4, exchange=Exchange.hierarchical, node_ranks=2, overlap_chunks=2
    ),
    "gather 4, shard 2, zero 1": Layout(4, shard=2, zero=1, expert=4, exchange=Exchange.gather),
    "symmetric 2 x expert_tensor 2, tensor 2": Layout(4, tensor=2, expert=2, expert_tensor=2, exchange=Exchange.symmetric),
    "context 2 x tensor 2, heads": Layout(4, context=2, tensor=2, expert=2, context_exchange=ContextExchange.heads),
    "context 2 of 4, keys": Layout(4, context=2, shard=4, expert=2),
    "pipeline 2 x expert 2, weights deferred": Layout(4, pipeline=2, expert=2, pipeline_schedule=PipelineSchedule["zbv"]),
    "pipeline 2 x expert 2, passes side by side": Layout(
        4, pipeline=2, expert=2, pipeline_schedule=PipelineSchedule["interleaved"], pipeline_overlap=True
    ),
}
SIZES: dict[str, Any] = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 4, "hidden": 12, "vocabulary": VOCABULARY}
DROPS = CapacityConfig(factor=0.8, scope=Scope.batch)
MODELS = {
    "drops over the batch, dropout, a dense layer, norms of all heads": ModelConfig(
        **SIZES,
        init_std=0.3,
        dense_first=1,
        mtp_depth=1,
        dropout=0.2,
        sandwich_norms=True,
        attention=AttentionConfig(qk_norm=QKNorm.full),
        moe=MoEConfig(8, 3, 16, shared_hidden=12, bias=True, dropout=0.4, capacity=DROPS),
    ),
    "latent attention": ModelConfig(
        **SIZES,
        init_std=0.3,
        moe=MoEConfig(8, 2, 16, balance=BalanceConfig(coefficient=0.05, scope=Scope.batch), shared_hidden=12, shared_gate=True),
        attention=AttentionConfig(
            kind=AttentionKind.mla, mla=MLAConfig(q_rank=12, kv_rank=12, nope_width=8, rope_width=4, value_width=8)
        ),
    ),
    "gated DeltaNet": ModelConfig(
        **SIZES,
        init_std=0.3,
        moe=MoEConfig(8, 2, 16, z_coefficient=0.01),
        attention=AttentionConfig(
            linear_every=2, delta=DeltaNetConfig(key_heads=2, value_heads=4, key_width=6, value_width=4, kernel=3)
        ),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_have_the_same_bits_and_nothing_is_sent_twice(ranks: Any, layout: str) -> None:
    """FSDP's gathers of weights are among what is sent. Recomputing whole blocks does send twice."""
    names = [name for name in MODELS if LAYOUTS[layout].context == 1 or "DeltaNet" not in name]
    for found in ranks(4, all_compared, LAYOUTS[layout], names):
        for name in names:
            wrong, sent = found[name]
            assert not wrong, (name, wrong)
            assert sent["selective"] == sent["offload"] == sent["none"], name
            assert sum(sent["block"].values()) > sum(sent["none"].values())


def all_compared(layout: Layout, names: list[str]) -> dict[str, tuple[list[str], dict[str, Counter[str]]]]:
    layers = 2 if layout.pipeline_schedule is PipelineSchedule["1f1b"] else 3  # for two stages on each of two ranks
    return {name: compared(layout, replace(MODELS[name], layers=layers)) for name in names}


def compared(layout: Layout, config: ModelConfig) -> tuple[list[str], dict[str, Counter[str]]]:
    """Returns the parameters whose gradients differ, and the collectives of a step by the kind of recomputation."""
    sent, gradients = {}, {}
    for recompute in Recompute:
        with mock.patch.object(offload, "SMALLEST", 64):
            gradients[recompute], sent[recompute.value] = one_step(layout._replace(recompute=recompute), config)
    expected = gradients[Recompute.none]
    assert any(gradient.abs().sum() > 0 for gradient in expected.values())
    same_bits = Recompute.selective, Recompute.offload
    return [
        f"{each} {name}" for each in same_bits for name in expected if not torch.equal(gradients[each][name], expected[name])
    ], sent


def one_step(layout: Layout, config: ModelConfig) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    parallel = build(layout, config)
    initialise(parallel, seed=1)
    starve_expert(parallel)
    optimizer = build_optimizer(OptimizerConfig(lr=0.01), parallel)
    with Sent() as sent:
        train_step(parallel, optimizer, StepInput(rows_of(parallel, 0, Case(config, micro_batches=2)), lr=0.0, clip_norm=None))
    return {name: local(p.parameter.grad) for name, p in parallel.parameters.items() if p.parameter.grad is not None}, sent.calls


class Sent(TorchDispatchMode):
    """Counts collectives and messages by their operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))
