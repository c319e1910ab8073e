"""Linear, embedding and norms. Weights may be wider than the activations: they are cast to the dtype of these where used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Products
from .deferred import defer_product, defers
from .device import constant_when_compiled, kind_of, uses_kernels
from .fp8 import product
from .kernels import operators
from .weight_cast import weight_as

# The dtype in which matrix products are computed.
#
# A CPU without bf16 instructions emulates them, at a fifth of the speed of fp32 (docs/performance.md). There, products of bf16
# numbers are computed in fp32 and rounded once, as CPUs with these instructions do internally.

CPUINFO = Path("/proc/cpuinfo")


def lists_bf16(cpuinfo: str) -> bool:
    """Whether these CPU flags, of x86 or ARM, include instructions for bf16 products."""
    return any(name in cpuinfo.split() for name in ("avx512_bf16", "amx_bf16", "bf16"))


MULTIPLIES_BF16 = lists_bf16(CPUINFO.read_text(errors="replace")) if CPUINFO.exists() else True
"""Whether this CPU does; True if not known. Read at import, since torch.compile cannot trace the reading."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype to which x is cast for a product: its own, or fp32 for bf16 on a CPU that would emulate it."""
    emulated = x.dtype == torch.bfloat16 and kind_of(x) == "cpu" and not MULTIPLIES_BF16
    return torch.float32 if emulated else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, products: Products = Products.wide) -> Tensor:
    """x @ weight.T + bias for x of shape (..., inputs) and weight of shape (outputs, inputs), in the dtype of x."""
    weight, wide = weight.to(x.dtype), compute_dtype(x)
    if products is not Products.wide:
        y = _narrow_linear(x, weight, products)
        return y if bias is None else y + bias
    if wide != x.dtype:
        y = wide_linear(x, weight, wide).to(x.dtype)
        return y if bias is None else y + bias
    if defers(x, weight):
        return defer_product(F.linear(x, weight.detach(), bias), x, weight, _weight_gradient)
    return F.linear(x, weight, bias)


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    wide = compute_dtype(x)
    return grad.flatten(0, -2).to(wide).T @ x.flatten(0, -2).to(wide)


def _narrow_linear(x: Tensor, weight: Tensor, products: Products) -> Tensor:
    """x @ weight.T, and the gradient of x, by operands in e4m3; the gradient of the weight is that of wide products."""
    if defers(x, weight):
        y: Any = _NarrowLinear.apply(x, weight.detach(), products)
        return defer_product(y, x, weight, _weight_gradient)
    return _NarrowLinear.apply(x, weight, products)  # pyright: ignore[reportReturnType]


class _NarrowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, products: Products) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.products = products
        return _product_of_one_group(products, x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, weight), (grad,) = ctx.saved_tensors, grads
        grad_x = _product_of_one_group(ctx.products, grad, weight.T) if ctx.needs_input_grad[0] else None
        return grad_x, _weight_gradient(grad, x).to(weight.dtype) if ctx.needs_input_grad[1] else None, None


def _product_of_one_group(products: Products, x: Tensor, weight: Tensor) -> Tensor:
    wide, rows = compute_dtype(x), x.flatten(0, -2)
    ends = torch.full((1,), len(rows), dtype=torch.int32, device=x.device)
    y = product(products, rows.to(wide), weight.to(wide).unsqueeze(0), ends)
    return y.to(x.dtype).unflatten(0, x.shape[:-1])


def wide_linear(x: Tensor, weight: Tensor, wide: torch.dtype) -> Tensor:
    """x @ weight.T in the dtype `wide`, never in TF32. Saves x and weight themselves for the backward pass, not wider copies."""
    if defers(x, weight) and not _by_parts(x, wide):  # routers, whose parts of the gradient serve both products
        y: Any = _WideLinear.apply(x, weight.detach(), wide)
        return defer_product(y, x, weight, _wide_weight_gradient)
    return _WideLinear.apply(x, weight, wide)  # pyright: ignore[reportReturnType]


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, wide: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        if _by_parts(x, wide):
            return _product_of_parts(x, weight)
        return _product(x.to(wide), weight.to(wide).T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, weight), (grad,) = ctx.saved_tensors, grads
        if _by_parts(x, grad.dtype):
            return *_product_of_parts_backward(x, weight, grad), None
        grad_x = _product(grad, weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        return grad_x, _wide_weight_gradient(grad, x).to(weight.dtype), None


def _wide_weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return _product(grad.flatten(0, -2).T, x.flatten(0, -2).to(grad.dtype))


# fp32 products with bf16 numbers on tensor cores, from the bf16 parts of the fp32 numbers; about a fifth of the time of fp32's.


def _by_parts(x: Tensor, wide: torch.dtype) -> bool:
    return x.dtype == torch.bfloat16 and wide == torch.float32 and uses_kernels(x)


def _product_of_parts(x: Tensor, weight_ED: Tensor) -> Tensor:
    """x @ weight.T in fp32 for bf16 x: the sum of the products with the three parts of the weight, each of which is exact."""
    parts_PED = operators.bf16_parts(weight_ED, [0, 1, 2], 0)
    products = operators.wide_mm(x.flatten(0, -2), parts_PED.T)
    return products.unflatten(1, (3, -1)).sum(1).unflatten(0, x.shape[:-1])


def _product_of_parts_backward(x: Tensor, weight_ED: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x, in bf16, and of the weight.

    Of the products of parts of the gradient g and the weight w, that of x leaves out those below 2**-17 of the largest, g1 w1 and
    g0 w2 among them.
    """
    parts_TPE, x_TD = operators.bf16_parts(grad.flatten(0, -2), [0, 1, 2, 0], 1), x.flatten(0, -2)
    grad_x_TD = parts_TPE @ operators.bf16_parts(weight_ED, [0, 0, 0, 1], 0)
    columns = 3 * len(weight_ED)
    grad_weight_ED = operators.wide_mm(parts_TPE[:, :columns].T, x_TD).unflatten(0, (3, -1)).sum(0)
    return grad_x_TD.view_as(x), grad_weight_ED.to(weight_ED.dtype)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in full fp32 precision, whatever the precision of other products."""
    return full_product(left, right) if makes_tf32() else left @ right


@constant_when_compiled
def makes_tf32() -> bool:
    """Whether fp32 products on CUDA use TF32. Code is compiled again when that changes."""
    return torch.get_float32_matmul_precision() != "highest"


@torch.library.custom_op("tokenyard::full_product", mutates_args=())
def full_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with TF32 disabled. A custom operator, since compiled code cannot switch it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return left @ right
    finally:
        torch.set_float32_matmul_precision(before)


@full_product.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(*left.shape[:-1], right.shape[-1])


class Linear(nn.Module):
    """x @ weight.T + bias for x of shape (..., inputs); weight of shape (outputs, inputs)."""

    def __init__(
        self, inputs: int, outputs: int, dtype: torch.dtype, bias: bool = False, products: Products = Products.wide
    ) -> None:
        super().__init__()
        self.products = products
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None
        self.adds_bias = bias
        """Whether to add the bias: False if the output is one part of a sum and another part adds it."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None and self.adds_bias else None
        return linear(x, weight_as(self.weight, x.dtype), bias, self.products)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}{'' if self.bias is None else ', bias'}"


class Embedding(nn.Module):
    """Rows of weight (vocabulary, width) by token id."""

    def __init__(self, vocabulary: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} x {self.weight.shape[1]}"


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019), or * (1 + weight) if `zero_centered`."""

    def __init__(self, width: int, epsilon: float, dtype: torch.dtype, zero_centered: bool = False) -> None:
        super().__init__()
        self.epsilon, self.zero_centered = epsilon, zero_centered
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.zero_centered:  # 1 + weight is not rounded to a narrow type
            wide = torch.promote_types(x.dtype, torch.float32)
            return F.rms_norm(x.to(wide), self.weight.shape, 1 + self.weight.to(wide), self.epsilon).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.epsilon)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}"


class HeadsNorm(nn.Module):
    """RMSNorm over all heads together, for x of shape (..., H, h), of which this device may hold some.

    `all_reduce` sums a tensor over the ranks that hold the other heads; `width` is that of all heads.
    """

    def __init__(self, width: int, epsilon: float, dtype: torch.dtype, zero_centered: bool = False) -> None:
        super().__init__()
        self.width, self.epsilon, self.zero_centered = width, epsilon, zero_centered
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))
        self.all_reduce: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum(dim=(-2, -1), keepdim=True)
        squares = squares if self.all_reduce is None else self.all_reduce(squares)
        normed = wide * (squares / self.width + self.epsilon).rsqrt()
        return (normed * (self.weight.to(wide.dtype) + self.zero_centered).view(x.shape[-2:])).to(x.dtype)
