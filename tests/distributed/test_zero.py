"""parallel.zero changes when FSDP2 gathers and reduces, and no number: counted collectives, and parity in fp64."""

from collections import Counter
from typing import Any

import pytest
import torch
from sameness import (
    SEQUENCES,
    VOCABULARY,
    Case,
    Layout,
    assert_layout_gives_the_numbers_of_one_process,
    build,
    rows_of,
)
from tokenyard.moe.config import BalanceConfig, ModelConfig, MoEConfig
from tokenyard.parallel.apply import Parallel
from tokenyard.train.config import OptimizerConfig
from tokenyard.train.loss import Totals
from tokenyard.train.optimizer import build_optimizer
from tokenyard.train.step import forward, train_step
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

LAYERS = 2
GROUPS = 2 * LAYERS + 1
"""What FSDP gathers as one: the experts of each layer, the rest of each block, embedding and head."""
MICRO_BATCHES = 4
PER_STEP = {
    # Embedding and head are used by the backward pass at once, so they are kept after the forward pass even as ZeRO-3.
    3: {"all_gather": MICRO_BATCHES * (2 * GROUPS - 1), "reduce_scatter": MICRO_BATCHES * GROUPS},
    2: {"all_gather": GROUPS, "reduce_scatter": MICRO_BATCHES * GROUPS},
    1: {"all_gather": GROUPS, "reduce_scatter": GROUPS},
}
LAYOUTS = {
    "shard 2": Layout(2, shard=2),
    "shard 2 x expert 2, recompute": Layout(2, shard=2, expert=2, recompute=True),
    "replicate 2 x shard 2 x expert 2": Layout(4, shard=2, expert=2),
    "tensor 2 x shard 2 x expert_tensor 2": Layout(4, tensor=2, shard=2, expert_tensor=2),
}


def case(micro_batches: int) -> Case:
    moe = MoEConfig(experts=8, hidden=16, z_coefficient=0.01, balance=BalanceConfig(coefficient=0.05))
    sizes: dict[str, Any] = {"layers": LAYERS, "width": 16, "heads": 4, "kv_heads": 4, "vocabulary": VOCABULARY, "init_std": 0.3}
    return Case(ModelConfig(**sizes, moe=moe), micro_batches)


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_no_number_changes(ranks, layout: Layout, zero: int) -> None:
    data = layout.world // layout.tensor
    assert_layout_gives_the_numbers_of_one_process(ranks, layout._replace(zero=zero), case(SEQUENCES // data))


@pytest.mark.parametrize("zero", PER_STEP)
def test_weights_travel_and_gradients_are_reduced_as_often_as_said(ranks, zero: int) -> None:
    expected = train_and_evaluate(Layout(1))
    found = ranks(2, train_and_evaluate, Layout(2, shard=2, zero=zero))
    for rank in found:
        assert rank["calls"] == [PER_STEP[zero], PER_STEP[zero]]
        assert rank["calls_after_evaluation"] == [{**PER_STEP[zero], "all_gather": PER_STEP[zero]["all_gather"] - kept(zero)}]
        assert rank["whole_after_step"] == set()
    summed = [sum(losses) for losses in zip(*(rank["losses"] for rank in found), strict=True)]
    assert summed == pytest.approx(expected["losses"], rel=1e-9)


def kept(zero: int) -> int:
    """What an evaluation has gathered and left whole for the step after it: as ZeRO-3 embedding and head alone."""
    return 1 if zero == 3 else GROUPS


def train_and_evaluate(layout: Layout) -> dict[str, Any]:
    """Two steps, an evaluation that leaves weights gathered, a step, and an evaluation that must see the new weights."""
    parallel = build(layout, case(MICRO_BATCHES).config)
    optimizer = build_optimizer(OptimizerConfig(lr=0.01), parallel)
    calls, losses, whole = [], [], set()
    sharded = {name for name, p in parallel.model.named_parameters() if isinstance(p, DTensor)}
    for step in range(3):
        if step == 2:
            losses.append(evaluate(parallel))
        with Collectives() as counted:
            train_step(parallel, optimizer, rows_of(parallel, step, case(MICRO_BATCHES)), lr=0.01, clip_norm=None)
        calls.append(dict(counted.calls))
        whole |= {name for name, p in parallel.model.named_parameters() if name in sharded and not isinstance(p, DTensor)}
    losses.append(evaluate(parallel))
    return {"calls": calls[:2], "calls_after_evaluation": calls[2:], "losses": losses, "whole_after_step": whole}


@torch.no_grad()
def evaluate(parallel: Parallel) -> float:
    """This rank's share of a loss."""
    [rows] = rows_of(parallel, 9, case(1))
    return forward(parallel, rows, Totals(tokens=1, sequences=1, micro_batches=1)).cross_entropy.item()


class Collectives(TorchDispatchMode):
    """Counts the collectives that FSDP uses, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter(all_gather=0, reduce_scatter=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = {"c10d._allgather_base_.default": "all_gather", "c10d._reduce_scatter_base_.default": "reduce_scatter"}
        if str(func) in names:
            self.calls[names[str(func)]] += 1
        return func(*args, **(kwargs or {}))
