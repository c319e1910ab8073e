"""The Triton kernels of products in FP8 by blocks equal the reference. They run in Triton's interpreter, on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton.language as tl
from tokenyard.bench.gpu import fused
from tokenyard.bench.gpu.contenders import without_kernels
from tokenyard.bench.gpu.row_error import LIMITS, worst_row
from tokenyard.moe.config import Products
from tokenyard.moe.device import dry_run
from tokenyard.moe.experts import Experts
from tokenyard.moe.fp8 import BLOCKS, product, rounded, scaled
from tokenyard.moe.grouped_products import grouped_mm
from tokenyard.moe.kernels import blockwise
from torch import Tensor
from triton.runtime import interpreter

OF_ROWS, OF_WEIGHTS = BLOCKS[Products.fp8_blockwise]
TYPES = {tl.float8e4nv: torch.float8_e4m3fn, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16, tl.float32: torch.float32}
CASES = {  # rows of each group, outputs, inputs
    "no rows": ([0, 0], 128, 256),
    "one row, smaller than a block": ([1], 1, 37),
    "empty first and last, rows of 16 bytes": ([0, 3, 130, 0], 144, 208),
    "whole blocks": ([128, 256, 0], 256, 128),
    "odd widths, many groups": ([5, 0, 1, 0, 0, 2, 0], 131, 259),
    "more tiles than are beside each other": ([1] * 16 + [0, 129], 16, 16),
}
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3}
"""Relative to the largest number."""


@pytest.fixture(autouse=True)
def casts_of_torch(bounded_kernels: None) -> Iterator[None]:
    """The interpreter's own cast to e4m3 loses the carry of 127.5 to 128, and that to bf16 cuts off; a GPU rounds as torch does."""
    real = interpreter._convert_float

    def cast(x: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if {source, target} <= set(TYPES):
            bits = torch.from_numpy(np.ascontiguousarray(x).view(f"u{x.itemsize}"))
            found = bits.view(TYPES[source]).to(TYPES[target])
            return found.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[found.element_size()]).numpy()
        return real(x, source, target, rounding)

    with patch.object(interpreter, "_convert_float", cast):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(0, 128), (1, 1), (33, 37), (70, 300)], ids=str)
def test_scaled_rows_are_those_of_the_reference_to_the_bit(size: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x_RK = (torch.randn(size) * torch.logspace(-2, 2, size[0])[:, None]).to(dtype)
    x_RK[1:2] = 0
    values, scales = blockwise.scale_rows(x_RK)
    assert_same(values, scales.T, *scaled(x_RK, OF_ROWS))


@pytest.mark.parametrize("transposed", [False, True], ids=["as stored", "transposed"])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 16, 208), (2, 259, 131)], ids=str)
def test_scaled_weights_are_those_of_the_reference_to_the_bit(size: tuple[int, int, int], transposed: bool) -> None:
    torch.manual_seed(0)
    stored = torch.randn(size) * torch.logspace(-3, 3, size[0])[:, None, None]
    weights_ENK = stored.transpose(1, 2) if transposed else stored
    values, scales = blockwise.scale_blocks(weights_ENK)
    assert values.is_contiguous()
    assert_same(values, scales, *scaled(weights_ENK, OF_WEIGHTS))


def assert_same(values: Tensor, scales: Tensor, expected_values: Tensor, expected_scales: Tensor) -> None:
    assert torch.equal(values.view(torch.uint8), expected_values.view(torch.uint8))
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, which the interpreter uses
def test_a_number_that_is_not_finite_spoils_its_block_and_no_other(bad: float) -> None:
    x_RK, weights_ENK = torch.randn(3, 256), torch.randn(1, 130, 256)
    x_RK[1, 5] = bad
    ends_E = torch.tensor([3], dtype=torch.int32)
    expected = grouped_mm(rounded(x_RK, OF_ROWS), rounded(weights_ENK, OF_WEIGHTS), ends_E)
    assert torch.equal(multiplied(x_RK, weights_ENK, ends_E).isnan(), expected.isnan()) and expected.isnan().sum() == 130
    weights_ENK[0, 129, 130] = bad
    assert multiplied(x_RK[:1], weights_ENK, torch.ones_like(ends_E)).isnan().tolist() == [[False] * 128 + [True] * 2]


def multiplied(x_RK: Tensor, weights_ENK: Tensor, ends_E: Tensor) -> Tensor:
    scaled_operands = *blockwise.scale_rows(x_RK), *blockwise.scale_blocks(weights_ENK)
    return blockwise.product_of_blocks(*scaled_operands, ends_E, x_RK.dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_products_and_gradients_of_rows(case: tuple[list[int], int, int], dtype: torch.dtype) -> None:
    """x W.T, and dy W by the same kernel. Memory is filled with NaN; two rows behind all groups change no other."""
    torch.manual_seed(0)
    (counts, outputs, inputs), rows = case, sum(case[0])
    x_RK, grad_RN = torch.randn(rows + 2, inputs).to(dtype), torch.randn(rows + 2, outputs).to(dtype)
    weights_ENK = torch.randn(len(counts), outputs, inputs).to(dtype) / inputs**0.5
    ends_E = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    torch.use_deterministic_algorithms(True)
    try:
        found = multiplied(x_RK, weights_ENK, ends_E), multiplied(grad_RN, weights_ENK.transpose(1, 2), ends_E)
    finally:
        torch.use_deterministic_algorithms(False)
    for left, weights, result in zip((x_RK, grad_RN), (weights_ENK, weights_ENK.transpose(1, 2)), found, strict=True):
        expected = product(Products.fp8_blockwise, left.double(), weights.double(), ends_E)[:rows]
        assert result.dtype == dtype and result.shape == (rows + 2, weights.shape[1])
        if rows:
            atol = TOLERANCES[dtype] * float(expected.abs().max())
            torch.testing.assert_close(result[:rows].double(), expected, rtol=0, atol=atol)


def test_every_run_gives_the_same_bits_and_reads_the_least() -> None:
    """Scaling reads each number once and writes it once; a product reads a block once for each tile beside it."""
    x_RK, weights_ENK, ends_E = torch.randn(200, 256), torch.randn(2, 384, 256), torch.tensor([130, 200], dtype=torch.int32)
    with moved() as bytes_of:
        rows, weights = blockwise.scale_rows(x_RK), blockwise.scale_blocks(weights_ENK)
        scaling = bytes_of.copy()
        results = [blockwise.product_of_blocks(*rows, *weights, ends_E, torch.float32) for _ in range(2)]
    assert torch.equal(*results)
    scaled_bytes = sum(x.nbytes for x in (*rows, *weights))
    assert scaling == {"loads": x_RK.nbytes + weights_ENK.nbytes, "stores": scaled_bytes}
    assert bytes_of["stores"] - scaled_bytes == 2 * results[0].nbytes
    tiles_of_columns, tiles_of_rows, tile = 3, 2 + 1, 128 * 256
    values = tiles_of_columns * rows[0].nbytes + tiles_of_rows * tiles_of_columns * tile
    loads = (bytes_of["loads"] - scaling["loads"]) / 2
    assert values < loads < 1.05 * values


@contextmanager
def moved() -> Iterator[dict[str, int]]:
    """Counts the bytes that kernels load and store inside."""
    counted, builder = {"loads": 0, "stores": 0}, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def add(kind: str, pointers: Any, mask: Any) -> None:
        counted[kind] += int(mask.data.sum()) * np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        add("loads", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        add("stores", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with patch.object(builder, "create_masked_load", counted_load), patch.object(builder, "create_masked_store", counted_store):
        yield counted


def test_experts_on_a_gpu_use_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, except for widths that are not of 16 bytes of e4m3. What is rounded between products then decides some roundings."""
    called: list[str] = []
    for name in ("scale_rows", "scale_blocks", "product_of_blocks"):
        real = getattr(blockwise, name)
        monkeypatch.setattr(blockwise, name, lambda *given, real=real, name=name: called.append(name) or real(*given))
    torch.manual_seed(0)
    experts = Experts(3, 144, 32, torch.bfloat16, products=Products.fp8_blockwise)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x_RD, grad_RD, counts_E = (
        torch.randn(9, 144).bfloat16().requires_grad_(),
        torch.randn(9, 144).bfloat16(),
        torch.tensor([4, 0, 5]),
    )
    inputs = [x_RD, *experts.parameters()]

    def outputs() -> list[Tensor]:
        y_RD = experts(x_RD, counts_E)
        return [y_RD.detach(), *torch.autograd.grad(y_RD, inputs, grad_RD)]

    expected = outputs()
    assert not called
    with dry_run("cuda"):
        found = outputs()
        assert called == 4 * ["scale_rows", "scale_blocks", "product_of_blocks"]
        experts.float()(x_RD.detach().float(), counts_E)
        product(Products.fp8_blockwise, torch.randn(4, 24).bfloat16(), torch.randn(1, 8, 24).bfloat16(), torch.tensor([4]).int())
    assert len(called) == 12
    experts.bfloat16().products = Products.wide
    for result, reference, wide in zip(found, expected, outputs(), strict=True):
        assert (result - reference).norm() < 0.5 * (wide - reference).norm()


def test_make_gpu_compares_them() -> None:
    def of(wide: bool) -> fused.Fused:
        found = fused.kernels(torch.device("cpu"), torch.bfloat16, *fused.SIZES["tiny"], wide=wide)
        return next(one for one in found if one.name == "product of the experts, fp8_blockwise")

    with dry_run("cuda"):
        (product_RN,), (reference_RN,) = of(wide=False).work(), without_kernels(of(wide=True).work)()
    assert product_RN.dtype == torch.bfloat16 and reference_RN.dtype == torch.float64
    assert 0 < worst_row(product_RN, reference_RN) < LIMITS[torch.bfloat16] / 3
