"""Expanded rows and their sums against a loop, with rows without copies and with padding."""

from typing import NamedTuple

import pytest
import torch
from tokenyard.parallel.dispatch.expand import Expansion, expand, plan_expansion, reduce
from torch import Tensor


class Case(NamedTuple):
    counts: list[int]
    """Choices of each row."""
    copies: int
    """Copies, padding included."""


CASES = {
    "uneven": Case([2, 0, 3, 1, 0, 2], 8),
    "padded": Case([1, 4, 0, 2], 11),
    "one each": Case([1, 1, 1], 3),
    "nothing": Case([0, 0], 0),
    "no rows": Case([], 0),
    "padding alone": Case([], 4),
}
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@EACH
def test_equals_a_loop(case: Case) -> None:
    expansion, copies_of = made(case)
    x_PD = torch.randn(len(case.counts), 3, dtype=torch.float64)
    y_RD, weights_C = torch.randn(case.copies, 3, dtype=torch.float64), torch.rand(sum(case.counts), dtype=torch.float64)
    copies_RD, summed_PD, weighted_PD = torch.zeros_like(y_RD), torch.zeros_like(x_PD), torch.zeros_like(x_PD)
    choice = 0
    for row, copies in enumerate(copies_of):
        for copy in copies:
            copies_RD[copy] = x_PD[row]
            summed_PD[row] += y_RD[copy]
            weighted_PD[row] += weights_C[choice] * y_RD[copy]
            choice += 1
    assert torch.equal(expand(x_PD, expansion), copies_RD)
    torch.testing.assert_close(reduce(y_RD, expansion), summed_PD)
    torch.testing.assert_close(reduce(y_RD, expansion, weights_C), weighted_PD)


@EACH
def test_derivatives(case: Case) -> None:
    expansion, _ = made(case)
    x_PD = torch.randn(len(case.counts), 2, dtype=torch.float64, requires_grad=True)
    y_RD = torch.randn(case.copies, 2, dtype=torch.float64, requires_grad=True)
    weights_C = torch.rand(sum(case.counts), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: expand(x, expansion), (x_PD,))
    assert torch.autograd.gradcheck(lambda y: reduce(y, expansion), (y_RD,))
    assert torch.autograd.gradcheck(lambda y, w: reduce(y, expansion, w), (y_RD, weights_C))


def test_bf16_copies_are_added_in_fp32() -> None:
    """Outputs and gradients are within one rounding of the exact values."""
    torch.manual_seed(0)
    expansion, copies_of = made(Case([9] * 16, 144))
    y_RD, x_PD = torch.randn(144, 32).bfloat16().requires_grad_(), torch.randn(16, 32).bfloat16().requires_grad_()
    weights_C = torch.rand(144).requires_grad_()
    grad_PD, grad_RD = torch.randn(16, 32).bfloat16(), torch.randn(144, 32).bfloat16()
    output = reduce(y_RD, expansion, weights_C)
    narrow = [output, *torch.autograd.grad(output, (y_RD, weights_C), grad_PD)]
    narrow += torch.autograd.grad(expand(x_PD, expansion), x_PD, grad_RD)
    copies = torch.tensor(copies_of)
    y_PKD, weights_PK1 = y_RD.double()[copies], weights_C.double().view(16, 9, 1)
    grad_y_RD = torch.zeros(144, 32, dtype=torch.float64)
    grad_y_RD[copies] = grad_PD.double().unsqueeze(1) * weights_PK1
    exact = [
        (y_PKD * weights_PK1).sum(1),
        grad_y_RD,
        (y_PKD * grad_PD.double().unsqueeze(1)).sum(-1).flatten(),
        grad_RD.double()[copies].sum(1),
    ]
    for value, expected in zip(narrow, exact, strict=True):
        half_unit = 2.0**-8 if value.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(value.double(), expected, rtol=half_unit, atol=1e-5)


def made(case: Case) -> tuple[Expansion, list[list[int]]]:
    """Returns an expansion whose choices are in random order, and the copies of each row."""
    torch.manual_seed(len(case.counts))
    row_C = torch.repeat_interleave(torch.arange(len(case.counts)), torch.tensor(case.counts, dtype=torch.int64))
    nth_C = torch.tensor([nth for count in case.counts for nth in range(count)], dtype=torch.int64)
    copy_C = torch.randperm(case.copies)[: len(row_C)]
    depths = [sum(count > k for count in case.counts) for k in range(max(case.counts, default=0))]
    parts: list[Tensor] = list(copy_C.split(case.counts)) if case.counts else []
    return plan_expansion(row_C, nth_C, copy_C, len(case.counts), depths, case.copies), [part.tolist() for part in parts]
