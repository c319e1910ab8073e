"""The grouped product of the experts equals a loop over them: outputs and all gradients. Activations, also of dense layers."""

import math

import pytest
import torch
from tokenyard.moe.config import Activation
from tokenyard.moe.experts import Experts, experts_by_loop
from tokenyard.moe.feedforward import FeedForward, activate
from tokenyard.moe.grouped_products import grouped_mm, grouped_outer
from torch import Tensor

WIDTH, HIDDEN = 16, 24
COUNTS = {
    "uneven": [5, 1, 9, 3],
    "empty groups": [0, 7, 0, 4],
    "last groups empty": [6, 2, 0, 0],
    "one group with everything": [0, 0, 13, 0],
    "one row": [0, 1, 0, 0],
}


PRECISIONS = [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_equals_the_loop(counts: list[int], dtype: torch.dtype, tolerance: float) -> None:
    assert_equals_the_loop(random_experts(len(counts), dtype), counts, tolerance)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS[:2])
@pytest.mark.parametrize("activation", [Activation.swiglu_clamped, Activation.relu_squared])
def test_biases_equal_the_loop(counts: list[int], dtype: torch.dtype, tolerance: float, activation: Activation) -> None:
    assert_equals_the_loop(random_experts(len(counts), dtype, activation, bias=True), counts, 2 * tolerance)


def assert_equals_the_loop(experts: Experts, counts: list[int], tolerance: float) -> None:
    dtype = experts.down.dtype
    x_RD = torch.randn(sum(counts), WIDTH, dtype=dtype, requires_grad=True)
    counts_E, weight_RD = torch.tensor(counts), torch.randn(sum(counts), WIDTH, dtype=dtype)
    y_RD, gradients = outcome(experts(x_RD, counts_E), weight_RD, experts, x_RD)
    expected_RD, expected = outcome(experts_by_loop(experts, x_RD, counts_E), weight_RD, experts, x_RD)
    assert y_RD.dtype == dtype
    assert_close(y_RD, expected_RD, tolerance)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert_close(gradient, reference, tolerance)
    for expert, count in enumerate(counts):
        used = [bool(gradient[expert].abs().max() > 0) for gradient in gradients[1:]]
        assert used == [count > 0] * len(used), "weights of experts without rows get zeros"


FORMULAS = {
    Activation.swiglu: lambda g, u: g / (1 + math.exp(-g)) * u,
    Activation.geglu: lambda g, u: 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u,
    Activation.swiglu_clamped: lambda g, u: min(g, 7) / (1 + math.exp(-1.702 * min(g, 7))) * (max(-7, min(u, 7)) + 1),
    Activation.gelu: lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    Activation.relu: lambda x: max(x, 0.0),
    Activation.relu_squared: lambda x: max(x, 0.0) ** 2,
}


@pytest.mark.parametrize("activation", Activation)
def test_activations_are_their_formulas(activation: Activation) -> None:
    formula, parts = FORMULAS[activation], activation.projections
    values = torch.tensor([-30.0, -7.5, -1.0, 0.0, 0.3, 2.0, 7.5, 30.0], dtype=torch.float64)
    inputs = torch.cartesian_prod(values, values) if parts == 2 else values[:, None]
    expected = torch.tensor([formula(*row) for row in inputs.tolist()], dtype=torch.float64)
    torch.testing.assert_close(activate(activation, inputs).squeeze(1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", Activation)
def test_the_dense_feedforward_is_one_expert(activation: Activation) -> None:
    """Both equal the formula, with gate before up."""
    experts, dense = random_experts(1, torch.float64, activation), FeedForward(WIDTH, HIDDEN, torch.float64, activation)
    dense.load_state_dict({"gate_up": experts.gate_up[0], "down": experts.down[0]})
    x_TD = torch.randn(5, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(dense(x_TD), experts_by_loop(experts, x_TD, torch.tensor([5])))
    products_TFP = torch.stack([x_TD @ weight.T for weight in experts.gate_up[0]], dim=-1)
    inner = [[FORMULAS[activation](*values) for values in row] for row in products_TFP.tolist()]
    torch.testing.assert_close(dense(x_TD), torch.tensor(inner, dtype=torch.float64) @ experts.down[0].T)


def test_equals_the_experts_of_gpt_oss() -> None:
    """gpt-oss interleaves gate and up in one dimension, and transposes the weights."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    experts = random_experts(3, torch.float64, Activation.swiglu_clamped, bias=True, std=2.0)
    assert experts.gate_up_bias is not None and experts.down_bias is not None
    config = gpt_oss.GptOssConfig(num_local_experts=3, hidden_size=WIDTH, intermediate_size=HIDDEN)
    theirs = gpt_oss.GptOssExperts(config).double()
    theirs.gate_up_proj.data = experts.gate_up.detach().permute(0, 3, 2, 1).flatten(-2)
    theirs.gate_up_proj_bias.data = experts.gate_up_bias.detach().transpose(1, 2).flatten(-2)
    theirs.down_proj.data, theirs.down_proj_bias.data = experts.down.detach().transpose(1, 2), experts.down_bias.detach()
    x_RD, choice_R1 = torch.randn(9, WIDTH, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])[:, None]
    expected_RD = gpt_oss.GptOssExperts.forward(theirs, x_RD, choice_R1, torch.ones(9, 1, dtype=torch.float64))
    torch.testing.assert_close(experts(x_RD, torch.tensor([3, 1, 5])), expected_RD, rtol=0, atol=1e-10)


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


def random_experts(
    count: int, dtype: torch.dtype, activation: Activation = Activation.swiglu, bias: bool = False, std: float = 0.3
) -> Experts:
    torch.manual_seed(0)
    experts = Experts(count, WIDTH, HIDDEN, dtype, activation, bias)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return experts


def outcome(y_RD: Tensor, weight_RD: Tensor, experts: Experts, x_RD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return y_RD.detach(), torch.autograd.grad(y_RD, [x_RD, *experts.parameters()], weight_RD)


def assert_close(value: Tensor, expected: Tensor, tolerance: float) -> None:
    """Returns the largest difference, relative to the largest element."""
    assert value.shape == expected.shape and value.dtype == expected.dtype
    assert (value - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "hidden"), [(16, 5), (6, 16), (7, 3)])
def test_widths_whose_rows_are_no_multiples_of_16_bytes(dtype: torch.dtype, width: int, hidden: int) -> None:
    """torch's grouped_mm refuses them; the product pads them with zeros, which change no sum."""
    torch.manual_seed(0)
    rows, ends = torch.randn(9, width, dtype=dtype), torch.tensor([4, 4, 9], dtype=torch.int32)
    weights = torch.randn(3, hidden, width, dtype=dtype)
    left = torch.randn(9, hidden, dtype=dtype)
    expected = torch.cat([rows[:4] @ weights[0].T, rows[4:] @ weights[2].T])
    outer = torch.stack([left[:4].T @ rows[:4], torch.zeros(hidden, width, dtype=dtype), left[4:].T @ rows[4:]])
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(grouped_mm(rows, weights, ends), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grouped_outer(left, rows, ends), outer, rtol=tolerance, atol=tolerance)
