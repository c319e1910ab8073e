"""The grouped product of the experts equals a loop over them: outputs and all gradients."""

import math

import pytest
import torch
from tokenyard.moe.experts import Experts, experts_by_loop
from torch import Tensor

WIDTH, HIDDEN = 16, 24
COUNTS = {
    "uneven": [5, 1, 9, 3],
    "empty groups": [0, 7, 0, 4],
    "last groups empty": [6, 2, 0, 0],
    "one group with everything": [0, 0, 13, 0],
    "one row": [0, 1, 0, 0],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_equals_the_loop(counts: list[int], dtype: torch.dtype, tolerance: float) -> None:
    experts, x_RD = random_experts(len(counts), dtype), torch.randn(sum(counts), WIDTH, dtype=dtype, requires_grad=True)
    counts_E, weight_RD = torch.tensor(counts), torch.randn(sum(counts), WIDTH, dtype=dtype)
    y_RD, gradients = outcome(experts(x_RD, counts_E), weight_RD, experts, x_RD)
    expected_RD, expected = outcome(experts_by_loop(experts, x_RD, counts_E), weight_RD, experts, x_RD)
    assert y_RD.dtype == dtype
    assert_close(y_RD, expected_RD, tolerance)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert_close(gradient, reference, tolerance)
    for expert, count in enumerate(counts):
        assert (gradients[1][expert].abs().max() > 0) == (count > 0), "weights of experts without rows get zeros"


def test_no_rows_give_no_rows_and_zero_gradients() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        experts, x_RD = random_experts(3, dtype), torch.zeros(0, WIDTH, dtype=dtype, requires_grad=True)
        y_RD = experts(x_RD, torch.zeros(3, dtype=torch.int64))
        assert y_RD.shape == (0, WIDTH) and y_RD.dtype == dtype
        y_RD.sum().backward()
        assert x_RD.grad is not None and x_RD.grad.shape == (0, WIDTH)
        assert all(p.grad is not None and p.grad.shape == p.shape and not p.grad.any() for p in experts.parameters())


def test_bf16_rows_use_the_rounded_weights_and_give_fp32_gradients() -> None:
    narrow, wide = random_experts(3, torch.bfloat16), random_experts(3, torch.float32)
    x_RD, counts_E = torch.randn(9, WIDTH, dtype=torch.bfloat16), torch.tensor([4, 0, 5])
    wide.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter *= 1 + 2.0**-12  # lost in bf16
    y_RD = wide(x_RD, counts_E)
    assert torch.equal(y_RD, narrow(x_RD, counts_E))
    y_RD.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in wide.parameters())


def test_one_by_one_against_the_formula() -> None:
    experts = Experts(2, 1, 1, torch.float64)
    experts.gate_up.data = torch.tensor([[0.5, 2.0], [-1.0, 3.0]], dtype=torch.float64).view(2, 2, 1, 1)
    experts.down.data = torch.tensor([0.7, -0.2], dtype=torch.float64).view(2, 1, 1)
    y_RD = experts(torch.tensor([[3.0], [4.0]], dtype=torch.float64), torch.tensor([1, 1]))
    expected = [0.7 * 1.5 / (1 + math.exp(-1.5)) * 6.0, -0.2 * -4.0 / (1 + math.exp(4.0)) * 12.0]
    torch.testing.assert_close(y_RD.flatten(), torch.tensor(expected, dtype=torch.float64))


def random_experts(count: int, dtype: torch.dtype) -> Experts:
    torch.manual_seed(0)
    experts = Experts(count, WIDTH, HIDDEN, dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def outcome(y_RD: Tensor, weight_RD: Tensor, experts: Experts, x_RD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return y_RD.detach(), torch.autograd.grad(y_RD, [x_RD, *experts.parameters()], weight_RD)


def assert_close(value: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest element."""
    assert value.shape == expected.shape and value.dtype == expected.dtype
    assert (value - expected).abs().max() <= tolerance * expected.abs().max()
