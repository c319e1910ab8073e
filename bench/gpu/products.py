"""Compares grouped products, and experts with each activation, with loops in fp64 on the CPU."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...moe.config import Activation
from ...moe.experts import Experts, experts_by_loop
from ...moe.grouped_products import grouped_mm, grouped_outer
from .recorder import Recorder
from .row_error import LIMITS, worst_row

GROUPS = {
    "even": [32, 32, 32, 32],
    "unaligned": [13, 7, 61, 3],
    "single rows": [1, 1, 1, 1],
    "empty": [0, 9, 0, 0],
    "empty, first and last": [0, 40, 17, 0],
    "all in one": [0, 0, 96, 0],
    "no rows": [0, 0, 0, 0],
}
"""The number of rows of each group."""
WIDTH, HIDDEN = 64, 96


class ExpertTensors(NamedTuple):
    """Output and gradients of experts, by name."""

    tensors: dict[str, Tensor]
    empty: list[Tensor]
    """The weight gradients of experts without rows."""


def run(recorder: Recorder) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    for name, counts in GROUPS.items():
        for dtype in dtypes:
            for what, value, limit in products(counts, dtype, recorder.device):
                recorder.below(f"{what}, {name}, {_short(dtype)}", value, limit)
    for activation in Activation:
        for name, counts in GROUPS.items():
            for dtype in dtypes[:2]:
                compare_experts(recorder, f"{activation.value}, {name}, {_short(dtype)}", activation, counts, dtype)


def products(counts: list[int], dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Yields name, error and limit of both operators against a loop. Memory that they do not write holds NaN."""
    torch.manual_seed(0)
    rows, left = (torch.randn(sum(counts), width).to(dtype) for width in (WIDTH, HIDDEN))
    weights = torch.randn(len(counts), HIDDEN, WIDTH).to(dtype)
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    poison(device)
    there = [x.to(device) for x in (rows, weights, left, ends)]
    pairs = list(zip(rows.double().split(counts), weights.double(), strict=True))
    expected = torch.cat([part @ weight.T for part, weight in pairs])
    yield "grouped_mm", worst_row(grouped_mm(there[0], there[1], there[3]), expected), LIMITS[dtype]
    parts = zip(left.double().split(counts), rows.double().split(counts), strict=True)
    outer = grouped_outer(there[2], there[0], there[3])
    yield "grouped_outer", worst_row(outer, torch.stack([a.T @ b for a, b in parts])), LIMITS[dtype]
    empty = [one for one, count in zip(outer, counts, strict=True) if not count]
    if empty:
        yield "grouped_outer of empty groups", largest(empty), 0.0


def compare_experts(recorder: Recorder, name: str, activation: Activation, counts: list[int], dtype: torch.dtype) -> None:
    """Compares forward and backward, and checks that experts without rows have gradients of exactly zero.

    Rounded products plus a bias may change their sign, where the derivative of relu jumps, so relu has no bias here.
    """
    torch.manual_seed(0)
    experts = Experts(len(counts), WIDTH, HIDDEN, torch.float64, activation, bias=activation is not Activation.relu)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=WIDTH**-0.5)
        parameter.data = parameter.data.to(dtype).double()
    x, gradient = (torch.randn(sum(counts), WIDTH).to(dtype) for _ in range(2))
    expected = run_experts(experts, x.double(), gradient.double(), counts, loop=True)
    poison(recorder.device)
    found = run_experts(experts.to(recorder.device, dtype), x.to(recorder.device), gradient.to(recorder.device), counts, loop=False)
    worst = max((worst_row(value, expected.tensors[key]), key) for key, value in found.tensors.items())
    recorder.below(f"experts, {name}", worst[0], LIMITS[dtype], f"the worst is {worst[1]}")
    if found.empty:
        recorder.below(f"experts without rows, {name}", largest(found.empty), 0.0, "largest gradient")


def run_experts(experts: Experts, x: Tensor, gradient: Tensor, counts: list[int], loop: bool) -> ExpertTensors:
    """Forward and backward; `loop` computes one expert after the other."""
    experts.zero_grad()
    x = x.requires_grad_()
    counts_E = torch.tensor(counts, device=x.device)
    y = experts_by_loop(experts, x, counts_E) if loop else experts(x, counts_E)
    y.backward(gradient)
    gradients = {name: _gradient(parameter) for name, parameter in experts.named_parameters()}
    empty = [one[expert] for one in gradients.values() for expert, count in enumerate(counts) if not count]
    return ExpertTensors({"output": y.detach(), "input's gradient": _gradient(x), **gradients}, empty)


def _gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def poison(device: torch.device, elements: int = 2**22) -> None:
    """Fill the memory that the allocator returns next with NaN, so that unwritten elements show."""
    if device.type == "cuda":
        for size in (elements, *[2**power for power in range(8, 19)] * 4):
            torch.full([size], torch.nan, device=device)


def largest(tensors: list[Tensor]) -> float:
    """The largest absolute value; infinite if any is NaN."""
    value = float(torch.stack([tensor.detach().abs().max().double() for tensor in tensors]).max())
    return value if value == value else float("inf")


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}[dtype]
