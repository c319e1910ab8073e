"""parallel.zero changes when FSDP2 gathers and reduces, and no number: counted collectives, and parity in fp64."""

from collections import Counter
from typing import Any
from unittest import mock

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
from tokenyard.parallel.dispatch import all_to_all
from tokenyard.train.config.config import OptimizerConfig
from tokenyard.train.optimizer import build_optimizer
from tokenyard.train.step import StepInput, head_losses, train_step
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

LAYERS = 2
GROUPS = 2 * LAYERS + 1
"""What FSDP gathers as one: the experts of each layer, the rest of each block, embedding and head."""
MICRO_BATCHES = 4
LAYOUTS = {
    "shard 2": Layout(2, shard=2),
    "shard 2 x expert 2, recompute": Layout(2, shard=2, expert=2, recompute=True),
    "replicate 2 x shard 2 x expert 2": Layout(4, shard=2, expert=2),
    "tensor 2 x shard 2 x expert_tensor 2": Layout(4, tensor=2, shard=2, expert_tensor=2),
}


def per_step(zero: int, groups: int) -> dict[str, int]:
    """The backward pass uses embedding and head first, so they stay gathered after the forward pass even with ZeRO-3."""
    gathers = MICRO_BATCHES * (2 * groups - 1) if zero == 3 else groups
    return {"all_gather": gathers, "reduce_scatter": groups if zero == 1 else MICRO_BATCHES * groups}


def case(micro_batches: int, **changes: Any) -> Case:
    moe = MoEConfig(experts=8, hidden=16, z_coefficient=0.01, balance=BalanceConfig(coefficient=0.05))
    sizes: dict[str, Any] = {"layers": LAYERS, "width": 16, "heads": 4, "kv_heads": 4, "vocabulary": VOCABULARY, "init_std": 0.3}
    return Case(ModelConfig(**sizes | changes, moe=moe), micro_batches)


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_no_number_changes(ranks, layout: Layout, zero: int) -> None:
    data = layout.world // layout.tensor
    assert_layout_gives_the_numbers_of_one_process(ranks, layout._replace(zero=zero), case(SEQUENCES // data))


@pytest.mark.parametrize("mtp_depth", [0, 1])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_weights_travel_and_gradients_are_reduced_as_often_as_said(ranks, zero: int, mtp_depth: int) -> None:
    """An evaluation does not gather weights of multi-token prediction, which it does not use."""
    expected, usual = train_and_evaluate(Layout(1), mtp_depth), per_step(zero, GROUPS + 2 * mtp_depth)
    found = ranks(2, train_and_evaluate, Layout(2, shard=2, zero=zero), mtp_depth)
    for rank in found:
        assert rank["calls"] == [usual, usual]
        assert rank["calls_after_evaluation"] == [{**usual, "all_gather": usual["all_gather"] - kept(zero)}]
        assert rank["whole_after_step"] == set()
    summed = [sum(losses) for losses in zip(*(rank["losses"] for rank in found), strict=True)]
    assert summed == pytest.approx(expected["losses"], rel=1e-9)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_next_block_is_asked_for_before_the_host_waits(ranks, recompute: bool, chunks: int) -> None:
    """Gathers begun when the host waits in each MoE layer, and when the backward pass of its experts begins; of 3 layers.

    Before that of layer 0: the root, its own two groups and those of layer 1, and no more than that.
    """
    layout = Layout(4, shard=2, expert=2, recompute=recompute, overlap_chunks=chunks)
    forward_gathers, backward_gathers = [5, 7, 7], [11, 13, 13]  # 7 and then 4, 6, 6
    again = backward_gathers if recompute else []
    for rank in ranks(4, gathers_begun, layout, 3):
        assert rank["at reads"] == [count for count in forward_gathers + again for _ in range(chunks)]
        assert rank["at experts"] == [count for count in backward_gathers for _ in range(chunks)]
        assert rank["all"] == {"all_gather": 13, "reduce_scatter": 7}


def gathers_begun(layout: Layout, layers: int) -> dict[str, Any]:
    """Counts the collectives of one step."""
    parallel = build(layout, case(1, layers=layers).config)
    begun: dict[str, Any] = {"at reads": [], "at experts": []}

    def at(place: str) -> None:
        begun[place].append(counted.calls["all_gather"])

    def read(x: torch.Tensor, *_: Any) -> Any:
        at("at reads")
        return x.tolist()

    for block in parallel.model.blocks:
        assert block.moe is not None
        block.moe.experts.register_forward_hook(lambda _, __, y: hooked(y))

    def hooked(y: torch.Tensor) -> None:
        if not torch._C._current_graph_task_id() >= 0:  # in a recomputation nobody differentiates it
            y.register_hook(lambda _: at("at experts"))

    with Collectives() as counted, mock.patch.object(all_to_all, "host_read", read):
        batch = StepInput(rows_of(parallel, 0, case(1)), lr=0.01, clip_norm=None)
        train_step(parallel, build_optimizer(OptimizerConfig(lr=0.01), parallel), batch)
    return begun | {"all": dict(counted.calls)}


def kept(zero: int) -> int:
    """Returns the parameters that an evaluation leaves gathered: with ZeRO-3 embedding and head only."""
    return 1 if zero == 3 else GROUPS


def train_and_evaluate(layout: Layout, mtp_depth: int) -> dict[str, Any]:
    """Two steps, an evaluation that leaves weights gathered, a step, and an evaluation that must see the new weights."""
    parallel = build(layout, case(MICRO_BATCHES, mtp_depth=mtp_depth).config)
    optimizer = build_optimizer(OptimizerConfig(lr=0.01), parallel)
    calls, losses, whole = [], [], set()
    sharded = {name for name, p in parallel.model.named_parameters() if isinstance(p, DTensor)}
    for step in range(3):
        if step == 2:
            losses.append(evaluate(parallel))
        with Collectives() as counted:
            train_step(parallel, optimizer, StepInput(rows_of(parallel, step, case(MICRO_BATCHES)), lr=0.01, clip_norm=None))
        calls.append(dict(counted.calls))
        whole |= {name for name, p in parallel.model.named_parameters() if name in sharded and not isinstance(p, DTensor)}
    losses.append(evaluate(parallel))
    return {"calls": calls[:2], "calls_after_evaluation": calls[2:], "losses": losses, "whole_after_step": whole}


@torch.no_grad()
def evaluate(parallel: Parallel) -> float:
    """Returns this rank's share of a loss."""
    [rows] = rows_of(parallel, 9, case(1))
    head_loss, *_ = head_losses(parallel, rows)
    parallel.model.eval()
    [loss], _ = parallel.model(rows.ids, head_losses=[head_loss])
    parallel.model.train()
    return loss.item()


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
