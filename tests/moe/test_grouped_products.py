"""The grouped product as an operator: derivatives, shapes without values, torch.compile."""

import pytest
import torch
from tokenyard.moe.device import dry_run
from tokenyard.moe.grouped_products import grouped_mm, grouped_outer
from torch import Tensor

INPUTS, OUTPUTS = 16, 8
ENDS = [[2, 2, 5, 6], [0, 0, 6, 6], [6, 6, 6, 6]]


@pytest.mark.parametrize("ends", ENDS)
def test_gradients_fp64(ends: list[int]) -> None:
    rows, weights = operands(6, len(ends), torch.float64, inputs=3, outputs=2)
    ends_E = torch.tensor(ends, dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda r, w: grouped_mm(r, w, ends_E), (rows, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ends", ENDS)
def test_outer_product_equals_a_loop(ends: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(6, OUTPUTS, dtype=dtype), torch.randn(6, INPUTS, dtype=dtype)
    product = grouped_outer(left, right, torch.tensor(ends, dtype=torch.int32))
    for got, start, end in zip(product, [0, *ends], ends, strict=False):
        torch.testing.assert_close(got, left[start:end].T @ right[start:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_rows_at_all_are_known_without_a_look_at_the_groups(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenyard.moe.grouped_products._sizes", None)  # reads them on the host
    (rows, weights), ends_E = operands(0, 3, dtype), torch.zeros(3, dtype=torch.int32)
    product = grouped_mm(rows, weights, ends_E)
    product.sum().backward()
    assert product.shape == (0, OUTPUTS) and product.dtype == dtype
    assert weights.grad is not None and weights.grad.shape == weights.shape and not weights.grad.any()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("ends", ENDS)
def test_a_group_without_rows_has_a_zero_product_whatever_torch_leaves_there(
    ends: list[int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    left, right, ends_E = torch.randn(6, OUTPUTS), torch.randn(6, INPUTS), torch.tensor(ends, dtype=torch.int32)
    expected, empty_E = grouped_outer(left, right, ends_E), torch.diff(ends_E, prepend=torch.zeros(1)) == 0
    assert empty_E.any() and not expected[empty_E].any()
    product = torch.nn.functional.grouped_mm

    def careless(*args: Tensor, **kwargs: Tensor) -> Tensor:
        return product(*args, **kwargs).masked_fill(empty_E[:, None, None], torch.nan)

    monkeypatch.setattr("torch.nn.functional.grouped_mm", careless)
    with dry_run(kind):
        assert torch.equal(grouped_outer(left, right, ends_E), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_the_gradient_of_a_plain_sum(dtype: torch.dtype) -> None:
    """The gradient of a sum is one number with strides of 0, which torch's operator refuses."""
    rows, weights = operands(6, 2, dtype)
    grouped_mm(rows, weights, torch.tensor([2, 6], dtype=torch.int32)).sum().backward()
    expected = torch.stack([rows[:2].detach().sum(0), rows[2:].detach().sum(0)])
    assert weights.grad is not None
    torch.testing.assert_close(weights.grad, expected[:, None].expand_as(weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_operator_keeps_torchs_rules(dtype: torch.dtype) -> None:
    ends_E = torch.tensor([2, 2, 6], dtype=torch.int32)
    rows, weights = operands(6, 3, dtype)
    torch.library.opcheck(grouped_mm, (rows, weights, ends_E), atol=1e-2, rtol=1e-2)
    torch.library.opcheck(grouped_outer, (rows.detach()[:, :OUTPUTS].contiguous(), rows.detach(), ends_E))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_whole_and_once_for_all_counts(dtype: torch.dtype) -> None:
    """Compiles up to the code generator, which calls the operator unchanged (tests/parallel/test_compile.py runs that too)."""
    torch.compiler.reset()
    compiled = torch.compile(squared_product, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, ends in enumerate([[3, 9, 9], [0, 5, 14], [7, 7, 40]]):
        rows, weights = operands(ends[-1], len(ends), dtype)
        ends_E = torch.tensor(ends, dtype=torch.int32)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            loss = compiled(rows, weights, ends_E)
        expected = squared_product(rows, weights, ends_E)
        torch.testing.assert_close(loss, expected)
        gradients, references = (torch.autograd.grad(value, [rows, weights]) for value in (loss, expected))
        for gradient, reference in zip(gradients, references, strict=True):
            torch.testing.assert_close(gradient, reference)


def squared_product(rows: Tensor, weights: Tensor, ends_E: Tensor) -> Tensor:
    return grouped_mm(rows * 2, weights, ends_E).float().square().mean()


def operands(rows: int, groups: int, dtype: torch.dtype, inputs: int = INPUTS, outputs: int = OUTPUTS) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    a = torch.randn(rows, inputs, dtype=dtype, requires_grad=True)
    return a, torch.randn(groups, outputs, inputs, dtype=dtype, requires_grad=True)
