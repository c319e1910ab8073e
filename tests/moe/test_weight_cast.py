"""Micro-batches share the casts of the weights and add to their gradients, with the numbers of casts of their own."""

from unittest.mock import patch

import pytest
import torch
from tokenyard.moe import weight_cast
from tokenyard.moe.device import dry_run
from tokenyard.moe.experts import Experts
from tokenyard.moe.feedforward import FeedForward
from tokenyard.moe.linear import Linear
from tokenyard.moe.weight_cast import add, shared_casts, weight_as
from torch import Tensor, nn

COUNTS_E = torch.tensor([3, 0, 4])


def run(model: nn.Module, x: Tensor) -> None:
    y = model(x, COUNTS_E) if isinstance(model, Experts) else model(x)
    y.float().square().sum().backward()


@pytest.mark.parametrize("kind", [Linear, FeedForward, Experts])
def test_gradients_are_the_fp32_sums_of_those_of_the_micro_batches(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Experts(3, 16, 8, torch.float32) if kind is Experts else kind(16, 8, torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    micro_batches = torch.randn(3, 7, 16).bfloat16()
    for x in micro_batches:
        run(model, x)
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    with shared_casts():
        for x in micro_batches:
            run(model, x)
        assert weight_cast._shared is not None and len(weight_cast._shared) == len(expected)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert gradient is not None and torch.equal(parameter.grad, gradient)
    assert weight_cast._shared is None


def test_two_uses_in_a_micro_batch_both_count() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    with shared_casts():
        for _ in range(3):
            (weight_as(weight, torch.bfloat16) * weight_as(weight, torch.bfloat16)).sum().backward()
    assert torch.equal(weight.grad, 6 * weight.detach())


def test_hooks_of_the_last_micro_batch_run_after_all_is_added() -> None:
    weight, seen = nn.Parameter(torch.ones(2)), []
    with shared_casts():
        weight_as(weight, torch.bfloat16).sum().backward()
        weight_as(weight, torch.bfloat16).sum().backward()
        hook = weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
        weight_as(weight, torch.bfloat16).sum().backward()
        hook.remove()
        weight_as(weight, torch.bfloat16).sum().backward()
    assert [one.tolist() for one in seen] == [[3.0, 3.0]] and weight.grad.tolist() == [4.0, 4.0]


def test_a_change_of_a_weight_after_the_step_is_seen() -> None:
    weight = nn.Parameter(torch.ones(2))
    for value in (1.0, 5.0):
        with torch.no_grad():
            weight.fill_(value)
        with shared_casts():
            assert weight_as(weight, torch.bfloat16).tolist() == [value, value]
    assert weight_as(weight, torch.float32) is weight


@pytest.mark.parametrize("size", [1, 1024, 2500])
def test_the_kernel_adds_as_torch_does(size: int) -> None:
    total, x = torch.randn(size), torch.randn(size).half()
    expected = total + x
    with dry_run("cuda"), patch.object(Tensor, "add_", lambda *_: pytest.fail("not by the kernel")):
        add(total, x)
    assert torch.equal(total, expected)
