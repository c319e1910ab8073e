"""FP8: operands of products, and tokens on their way to experts, as scaled numbers of float8_e4m3fn.

A block of numbers shares a scale, which maps its largest magnitude to 448, the largest of e4m3. A product of such operands is the
product of the numbers that they stand for, summed in fp32 or wider. So the reference, on every device, rounds both operands and
multiplies with `grouped_mm`; a kernel, where there is one of torch or in kernels/blockwise.py, takes the e4m3 numbers and scales
themselves. Scales come from the operands at hand, on the device, so there is no history of them, and the host waits for nothing.

R rows, E groups, K inputs, N outputs, D width of a token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import MX_BLOCK, SCALE_BLOCK, ModelConfig, Products
from .device import KERNELS_LACK, constant_when_compiled, is_simulated, kind_of, log, uses_kernels
from .grouped_products import grouped_mm

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_MAGNITUDE = 1e-30
"""Stands for the largest magnitude of a block of zeros."""
EXPONENT_BITS, MANTISSA_BITS = 0x7F800000, 23
"""Of fp32."""


class Blocks(NamedTuple):
    """Numbers that share a scale: so many rows of so many columns, by default whole rows. The last blocks may be smaller."""

    rows: int
    columns: int | None = None
    power_of_two: bool = False
    """The scale is rounded up to a power of two, so that no number is beyond 448 and scaling rounds nothing."""


MX = Blocks(1, MX_BLOCK, power_of_two=True)
BLOCKS = {
    Products.fp8_rowwise: (Blocks(1), Blocks(1)),
    Products.fp8_blockwise: (Blocks(1, SCALE_BLOCK), Blocks(SCALE_BLOCK, SCALE_BLOCK)),  # DeepSeek-V3, section 3.3.2
    Products.mxfp8: (MX, MX),  # OCP Microscaling Formats 1.0
}
"""Of rows and weights, along the inputs of a product."""
TOKENS = Blocks(1, SCALE_BLOCK, power_of_two=True)
"""Of tokens that travel (DeepSeek-V3, section 3.3.3): then they are the same numbers in bf16, and rounded a second time."""


def product(products: Products, rows_RK: Tensor, weights_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """See `grouped_mm`, (R, N); unless `products` is wide, of both operands rounded to e4m3. Not differentiable then."""
    if products is Products.wide:
        return grouped_mm(rows_RK, weights_ENK, ends_E)
    of_rows, of_weights = BLOCKS[products]
    if has_kernel(products, rows_RK, weights_ENK):
        if products is Products.fp8_blockwise:
            return product_of_blocks(*scale_rows(rows_RK), *scale_blocks(weights_ENK), ends_E)
        (rows, row_scales), (weights, weight_scales) = scaled(rows_RK, of_rows), scaled(weights_ENK, of_weights)
        return scaled_grouped_mm(rows, weights.contiguous(), row_scales, weight_scales, ends_E, products is Products.mxfp8)
    return grouped_mm(rounded(rows_RK, of_rows), rounded(weights_ENK, of_weights), ends_E)


def scaled(x: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Returns x (..., R, C) in e4m3, and the scales of its blocks, fp32. A block with a number that is not finite becomes NaN."""
    largest = torch.linalg.vector_norm(_in_blocks(x, blocks), torch.inf, dim=(-3, -1)).float()
    scales = largest.clamp(min=SMALLEST_MAGNITUDE) / LARGEST
    if blocks.power_of_two:
        powers = ((scales.view(torch.int32) + (1 << MANTISSA_BITS) - 1) & EXPONENT_BITS).view(torch.float32)
        scales = powers + 0 * scales  # NaN where they are not finite
    return _with_scales(torch.div, x, scales, blocks).to(E4M3), scales


def widened(values: Tensor, scales: Tensor, blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """Returns the numbers that the result of `scaled` stands for."""
    wide = values.to(torch.promote_types(dtype, torch.float32))
    return _with_scales(torch.Tensor.mul_, wide, scales, blocks).to(dtype)


def rounded(x: Tensor, blocks: Blocks) -> Tensor:
    """Returns the numbers of e4m3 and of a scale that are the nearest to x (..., R, C), in the dtype of x."""
    return widened(*scaled(x, blocks), blocks, x.dtype)


def _with_scales(operation: Callable[[Tensor, Tensor], Tensor], x: Tensor, scales: Tensor, blocks: Blocks) -> Tensor:
    """Returns the operation on x (..., R, C) and the scale of each number.

    Blocks that are smaller than others are not padded, multiplied and cut off again: torch 2.13 generates wrong code for a slice of
    the last two dimensions made one.
    """
    sizes = (blocks.rows, -2), (blocks.columns or x.shape[-1], -1)
    if all(x.shape[dim] % size == 0 for size, dim in sizes):
        return operation(_in_blocks(x, blocks), scales.unsqueeze(-2).unsqueeze(-1)).flatten(-4, -3).flatten(-2)
    for size, dim in sizes:
        scales = scales.index_select(dim, torch.arange(x.shape[dim], device=x.device) // size)
    return operation(x, scales)


def _in_blocks(x: Tensor, blocks: Blocks) -> Tensor:
    """(..., R, C) to (..., blocks of rows, rows, blocks of columns, columns), padded with zeros."""
    rows, columns = blocks.rows, blocks.columns or x.shape[-1]
    if x.shape[-1] % columns or x.shape[-2] % rows:
        x = F.pad(x, (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows))
    return x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))


# Kernels. None of torch's has run yet: the tests run a double with the interface.


def has_kernel(products: Products, rows_RK: Tensor, weights_ENK: Tensor) -> bool:
    """Whether there is a kernel for these operands, which must be bf16, in rows of 16 bytes of e4m3, for mxfp8 in whole blocks."""
    if kind_of(rows_RK) != "cuda" or rows_RK.dtype != torch.bfloat16:
        return False
    if products is Products.fp8_blockwise and not uses_kernels(rows_RK):
        return False
    unit = MX_BLOCK if products is Products.mxfp8 else 16
    return not any(size % unit for size in weights_ENK.shape[1:]) and products in _with_kernels(rows_RK.device)


@constant_when_compiled
def _with_kernels(device: torch.device) -> list[Products]:
    """Returns what this GPU has kernels for: `torch._scaled_grouped_mm` does rowwise on sm_90 and MX on sm_100, Triton does
    blockwise on both. A dry run has all.
    """
    if is_simulated():
        return [Products.fp8_rowwise, Products.fp8_blockwise, Products.mxfp8]
    of_torch = {(9, 0): Products.fp8_rowwise, (10, 0): Products.mxfp8}.get(torch.cuda.get_device_capability(device))
    of_triton = [] if of_torch is None or KERNELS_LACK else [Products.fp8_blockwise]
    return of_triton if of_torch is None else [of_torch, *of_triton]


def warn_of_emulated_products(config: ModelConfig, device: torch.device) -> None:
    """Warns in one line of products in FP8 for which this GPU has no kernel."""
    settings = {"model.products": config.products, "model.moe.products": config.moe.products}
    known = [Products.wide, *(_with_kernels(device) if device.type == "cuda" else list(Products))]
    emulated = [f"{key}={products.value}" for key, products in settings.items() if products not in known]
    if emulated:
        log.warning(
            "no kernel for %s on this GPU: the rounded numbers are multiplied in bf16, slower than wide", " ".join(emulated)
        )


@torch.library.custom_op("tokenyard::scaled_grouped_mm", mutates_args=())
def scaled_grouped_mm(
    rows_RK: Tensor, weights_ENK: Tensor, row_scales: Tensor, weight_scales: Tensor, ends_E: Tensor, mx: bool
) -> Tensor:
    """See `grouped_mm`, (R, N) in bf16, of operands in e4m3 with the scales of fp8_rowwise or `mx`fp8."""
    if not len(rows_RK):
        return rows_RK.new_empty(0, weights_ENK.shape[1], dtype=torch.bfloat16)
    if mx:
        scales = _of_groups(row_scales, ends_E), _swizzled(weight_scales).flatten(1)
    else:
        scales = row_scales.squeeze(1), weight_scales.squeeze(2)
    multiply: Any = torch._scaled_grouped_mm  # pyright: ignore[reportPrivateImportUsage]
    return multiply(rows_RK, weights_ENK.transpose(1, 2), *scales, offs=ends_E, out_dtype=torch.bfloat16)


@scaled_grouped_mm.register_fake
def _(rows_RK: Tensor, weights_ENK: Tensor, row_scales: Tensor, weight_scales: Tensor, ends_E: Tensor, mx: bool) -> Tensor:
    return rows_RK.new_empty(rows_RK.shape[0], weights_ENK.shape[1], dtype=torch.bfloat16)


@torch.library.custom_op("tokenyard::scale_rows", mutates_args=())
def scale_rows(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 (R, K) and fp32 (blocks, R): rows in the blocks of fp8_blockwise."""
    from .kernels import blockwise

    return blockwise.scale_rows(x_RK)


@scale_rows.register_fake
def _(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = x_RK.shape
    return x_RK.new_empty(rows, width, dtype=E4M3), x_RK.new_empty(_blocks(width), rows, dtype=torch.float32)


@torch.library.custom_op("tokenyard::scale_blocks", mutates_args=())
def scale_blocks(weights_ENK: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 (E, N, K), contiguous, and fp32 (E, blocks, blocks): weights in the blocks of fp8_blockwise."""
    from .kernels import blockwise

    return blockwise.scale_blocks(weights_ENK)


@scale_blocks.register_fake
def _(weights_ENK: Tensor) -> tuple[Tensor, Tensor]:
    shape = weights_ENK.shape
    scales = weights_ENK.new_empty(shape[0], _blocks(shape[1]), _blocks(shape[2]), dtype=torch.float32)
    return torch.empty(shape, dtype=E4M3, device=weights_ENK.device), scales


def _blocks(size: int) -> int:
    return (size + SCALE_BLOCK - 1) // SCALE_BLOCK


@torch.library.custom_op("tokenyard::product_of_blocks", mutates_args=())
def product_of_blocks(rows_RK: Tensor, row_scales: Tensor, weights_ENK: Tensor, weight_scales: Tensor, ends_E: Tensor) -> Tensor:
    """See `grouped_mm`, (R, N) in bf16, of the results of `scale_rows` and `scale_blocks`."""
    from .kernels import blockwise

    return blockwise.product_of_blocks(rows_RK, row_scales, weights_ENK, weight_scales, ends_E, torch.bfloat16)


@product_of_blocks.register_fake
def _(rows_RK: Tensor, row_scales: Tensor, weights_ENK: Tensor, weight_scales: Tensor, ends_E: Tensor) -> Tensor:
    return rows_RK.new_empty(rows_RK.shape[0], weights_ENK.shape[1], dtype=torch.bfloat16)


def _of_groups(scales_RB: Tensor, ends_E: Tensor) -> Tensor:
    """Returns the scales of rows as the MX kernel reads them: each group begins at a multiple of 128 rows, however many it has."""
    sizes_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
    padded_E = (sizes_E + 127) // 128 * 128
    shift_E = (padded_E.cumsum(0) - padded_E) - (ends_E - sizes_E)
    index_R = torch.arange(len(scales_RB), device=ends_E.device)
    group_R = torch.searchsorted(ends_E, index_R, right=True).clamp_(max=len(ends_E) - 1)
    apart = scales_RB.new_ones((len(scales_RB) // 128 + 1 + len(ends_E)) * 128, scales_RB.shape[1])
    return _swizzled(apart.index_copy_(0, index_R + shift_E[group_R], scales_RB))


def _swizzled(scales: Tensor) -> Tensor:
    """Returns scales (..., rows, blocks) in e8m0, padded to multiples of (128, 4), in the order of tensor cores: in tiles of that
    size, row 32 q + s and block b at 16 s + 4 q + b (cuBLAS, 1D block scaling factors layout).
    """
    rows, blocks = scales.shape[-2:]
    scales = F.pad(scales, (0, -blocks % 4, 0, -rows % 128), value=1.0)
    tiles = scales.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4, 32))  # (..., tile row, q, s, tile column, b)
    return tiles.movedim(-2, -4).transpose(-3, -2).reshape(scales.shape).to(torch.float8_e8m0fnu)


# Tokens that travel: a byte for each number, behind them one for the exponent of each scale.


class _RoundTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor) -> Tensor:
        return rounded(x_TD, TOKENS)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


def round_tokens(x_TD: Tensor) -> Tensor:
    """Returns tokens (T, D) as they arrive if they travel in e4m3; a gradient passes as it is."""
    return _RoundTokens.apply(x_TD)  # pyright: ignore[reportReturnType]


def pack_tokens(x_RD: Tensor) -> Tensor:
    """Returns rows as bytes (R, D + D / 128, rounded up). Exact for rows of `round_tokens`."""
    values, scales = scaled(x_RD, TOKENS)
    return torch.cat([values.view(torch.uint8), (scales.view(torch.int32) >> MANTISSA_BITS).to(torch.uint8)], dim=1)


def unpack_tokens(packed: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Returns rows (R, D) of `width` D from the bytes of `pack_tokens`."""
    scales = (packed[:, width:].to(torch.int32) << MANTISSA_BITS).view(torch.float32)
    return widened(packed[:, :width].view(E4M3), scales, TOKENS, dtype)
