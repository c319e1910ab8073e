"""Gradients are summed over replicas during the backward pass, and equal bit for bit those summed after it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from sameness import VOCABULARY, Case, Layout, build, rows_of
from tokenyard.moe.config import AttentionConfig, BalanceConfig, ModelConfig, MoEConfig
from tokenyard.parallel import gradients
from tokenyard.parallel.apply import Parallel, gradient_of
from tokenyard.parallel.collective_check import compare
from tokenyard.parallel.progress import check_before_collectives
from tokenyard.train import step
from tokenyard.train.config.config import OptimizerConfig
from tokenyard.train.optimizer import build_optimizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LAYOUTS = {
    "replicate 4": Layout(4),
    "replicate 2 x shard 2": Layout(4, shard=2),
    "replicate 2 x shard 2, recompute": Layout(4, shard=2, recompute=True),
    "expert 2, twice": Layout(4, expert=2),
    "tensor 2": Layout(4, tensor=2, expert=2),
}
EACH = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def case(micro_batches: int = 2, tie_embeddings: bool = False, bias: bool = False) -> Case:
    moe = MoEConfig(experts=8, hidden=16, z_coefficient=0.01, balance=BalanceConfig(coefficient=0.05), bias=bias)
    sizes: dict[str, Any] = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 4, "vocabulary": VOCABULARY, "init_std": 0.3}
    attention = AttentionConfig(output_bias=bias)
    return Case(ModelConfig(**sizes, moe=moe, attention=attention, mtp_depth=1, tie_embeddings=tie_embeddings), micro_batches)


@EACH
def test_sums_depart_before_the_last_gradient_is_made(ranks: Any, layout: Layout) -> None:
    """Sums start in the last micro-batch, not in the one before it. The embedding's gradient is the last."""
    for events in ranks(4, order, layout):
        first, last = [part.split() for part in " ".join(events).split("backward")[1:3]]
        assert "all_reduce" not in first[: first.index("embedding")]
        assert last[: last.index("embedding")].count("all_reduce") >= 3
        assert last[last.index("embedding") :].count("all_reduce") >= 1


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_fsdp_reduces_the_gradients_of_a_block_before_the_backward_pass_of_the_block_below(ranks: Any, zero: int) -> None:
    """Of layer 1 and multi-token prediction, two groups each; then layer 0 and at last the root. With ZeRO-1 at the last of two."""
    for events in ranks(2, order, Layout(2, shard=2, zero=zero)):
        first, last = [part.split() for part in " ".join(events).split("backward")[1:3]]
        for seen, reduces in ((first, zero > 1), (last, True)):
            below = seen.index("layer_0")
            counts = [part.count("reduce_scatter") for part in (seen[:below], seen[below:])]
            assert counts == ([4, 3] if reduces else [0, 0])


def order(layout: Layout) -> list[str]:
    """Returns the events of a step; "layer_0" is the beginning of its backward pass."""
    parallel = build(layout, case().config)
    optimizer = build_optimizer(OptimizerConfig(lr=0.01), parallel)
    events = Events()

    def backward(share: Any) -> None:
        events.seen.append("backward")
        share.objective.backward()

    def outputs(_module: Any, _inputs: Any, output: Any) -> None:
        output[0].register_hook(lambda _: events.seen.append("layer_0"))

    parallel.model.blocks[0].register_forward_hook(outputs)
    with small_buckets(), mock.patch.object(step, "backward", backward), events:
        step.train_step(parallel, optimizer, step.StepInput(rows_of(parallel, 0, case()), lr=0.01, clip_norm=None))
    return events.seen


class Events(TorchDispatchMode):
    names: ClassVar = {
        "allreduce_": "all_reduce",
        "_reduce_scatter_base_": "reduce_scatter",
        "embedding_dense_backward": "embedding",
    }

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in self.names:
            self.seen.append(self.names[func._opname])
        return func(*args, **(kwargs or {}))


@EACH
@pytest.mark.parametrize("tied", [False, True])
def test_the_sums_are_those_after_the_backward_pass_bit_for_bit(ranks: Any, layout: Layout, tied: bool) -> None:
    assert ranks(4, same_bits, layout, tied) == 4 * [True]


def same_bits(layout: Layout, tied: bool) -> bool:
    """Compares every gradient, with buckets of two sizes."""
    parallel = build(layout, case(1, tied).config)
    results = []
    for bucket in (2**23, 500):
        with small_buckets(bucket):
            results.append([made(parallel, overlapped, case(1, tied)) for overlapped in (True, False)])
    return all(torch.equal(a, b) for first, second in results for a, b in zip(first, second, strict=True))


def made(parallel: Parallel, overlapped: bool, of: Case) -> list[Tensor]:
    """Returns the gradients of one micro-batch."""
    parallel.model.zero_grad(set_to_none=True)
    [rows] = rows_of(parallel, 0, of)
    step.prepare_backward(parallel.model, parallel.zero, True)
    share = step.forward(parallel, rows, step.count_totals(parallel, [rows]))
    if overlapped:
        with gradients.gradient_all_reduce(parallel):
            share.objective.backward()
    else:
        share.objective.backward()
        with gradients.gradient_all_reduce(parallel):
            pass
    return [gradient_of(sharded).clone() for sharded in parallel.parameters.values()]


@pytest.mark.parametrize("layout", [Layout(2, tensor=2, expert=2), Layout(2, expert_tensor=2)])
def test_all_ranks_start_the_same_collectives_where_one_adds_a_bias(ranks: Any, layout: Layout) -> None:
    """The other ranks have no gradient for that bias."""
    found = ranks(2, checked_step, layout)
    assert found[0] == found[1] > 0


def checked_step(layout: Layout) -> float:
    """Returns the gradient norm; each collective is checked before it begins."""
    parallel = build(layout, case(bias=True).config)
    optimizer = build_optimizer(OptimizerConfig(lr=0.01), parallel)
    check_before_collectives(compare)
    try:
        with small_buckets(1):
            numbers = step.train_step(parallel, optimizer, step.StepInput(rows_of(parallel, 0, case()), lr=0.01, clip_norm=None))
    finally:
        check_before_collectives(None)
    return numbers.gradient_norm.item()


def test_a_failed_backward_pass_leaves_no_hook(ranks: Any) -> None:
    assert ranks(2, fail_and_go_on, Layout(2)) == 2 * [True]


def fail_and_go_on(layout: Layout) -> bool:
    parallel = build(layout, case(1).config)
    expected = made(parallel, False, case(1))
    with pytest.raises(ArithmeticError), gradients.gradient_all_reduce(parallel):
        raise ArithmeticError
    return all(torch.equal(a, b) for a, b in zip(made(parallel, False, case(1)), expected, strict=True))


@contextmanager
def small_buckets(elements: int = 500) -> Iterator[None]:
    with mock.patch.object(gradients, "BUCKET", elements):
        yield
