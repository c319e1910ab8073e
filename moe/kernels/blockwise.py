"""Triton kernels of products in FP8 by blocks (DeepSeek-V3, section 3.3.2): the scaled e4m3 numbers of rows and of weights, and the
product of groups of rows from them.

Tensor cores sum the 128 products of a block along the inputs, with fewer bits than fp32; the sum of each block is multiplied by
both scales and added up in fp32. A program owns what it writes and sums in one order, so every run gives the same bits.

R rows, E groups, K inputs, N outputs.
"""

# Launches pass numbers where kernels declare constants.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import SCALE_BLOCK

ROWS = 128
"""Rows of a product's tile: its sums are 64 registers of a thread, and those of a block as many."""
SCALED_ROWS = 32
"""Rows that a program scales at a time."""
TILES_OF_ROWS = 16
"""Tiles of rows whose products with the same weights run beside each other, so that both come out of the cache of the GPU."""
STAGES = 4
"""Blocks along the inputs that are on their way while one is multiplied: 32 KiB of shared memory each."""


@triton.jit
def _scale_of(bits):
    """Returns the scale of the largest magnitude, given by its bits: they order NaN behind all numbers, and pass it on."""
    largest = bits.to(tl.float32, bitcast=True)
    return tl.div_rn(tl.where(largest < 1e-30, 1e-30, largest), tl.full(largest.shape, 448.0, tl.float32))


@triton.jit
def _scale_rows(x_ptr, value_ptr, scale_ptr, R, K, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = (row < R)[:, None] & (column < K)[None, :]
    place = row.to(tl.int64)[:, None] * K + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    scale = _scale_of(tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1))
    values = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    tl.store(value_ptr + place, values.to(value_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + block.to(tl.int64) * R + row, scale, mask=row < R)


def scale_rows(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """See `fp8.scaled`, for blocks of 128 columns of a row; scales are (blocks, R), since a product reads those of a block."""
    x_RK, (rows, width) = x_RK.contiguous(), x_RK.shape
    blocks = triton.cdiv(width, SCALE_BLOCK)
    values, scales = x_RK.new_empty(rows, width, dtype=torch.float8_e4m3fn), x_RK.new_empty(blocks, rows, dtype=torch.float32)
    if x_RK.numel():
        grid = triton.cdiv(rows, SCALED_ROWS), blocks
        _scale_rows[grid](x_RK, values, scales, rows, width, SCALED_ROWS, SCALE_BLOCK)
    return values, scales


@triton.jit
def _scale_blocks(x_ptr, value_ptr, scale_ptr, A, B, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr):
    """Of matrices (A, B) in memory; (B, A) if transposed."""
    down, across, matrix = tl.program_id(1), tl.program_id(0), tl.program_id(2).to(tl.int64)
    a, b = down * BLOCK + tl.arange(0, BLOCK), across * BLOCK + tl.arange(0, BLOCK)
    inside = (a < A)[:, None] & (b < B)[None, :]
    first = matrix * A * B
    place = first + a.to(tl.int64)[:, None] * B + b[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    scale = _scale_of(tl.max(tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1), 0))
    values = tl.div_rn(x, tl.broadcast_to(scale, x.shape)).to(value_ptr.dtype.element_ty)
    scales = scale_ptr + matrix * tl.num_programs(1) * tl.num_programs(0)
    if TRANSPOSED:
        place = first + b.to(tl.int64)[:, None] * A + a[None, :]
        tl.store(value_ptr + place, tl.trans(values), mask=tl.trans(inside))
        tl.store(scales + across * tl.num_programs(1) + down, scale)
    else:
        tl.store(value_ptr + place, values, mask=inside)
        tl.store(scales + down * tl.num_programs(0) + across, scale)


def scale_blocks(weights_ENK: Tensor) -> tuple[Tensor, Tensor]:
    """See `fp8.scaled`, for blocks of 128 x 128; contiguous, also of a transposed tensor, which is read as it lies."""
    transposed = not weights_ENK.is_contiguous()
    stored = (weights_ENK.transpose(1, 2) if transposed else weights_ENK).contiguous()
    blocks = triton.cdiv(weights_ENK.shape[1], SCALE_BLOCK), triton.cdiv(weights_ENK.shape[2], SCALE_BLOCK)
    values = torch.empty(weights_ENK.shape, dtype=torch.float8_e4m3fn, device=weights_ENK.device)
    scales = weights_ENK.new_empty(len(weights_ENK), *blocks, dtype=torch.float32)
    grid = triton.cdiv(stored.shape[2], SCALE_BLOCK), triton.cdiv(stored.shape[1], SCALE_BLOCK), len(stored)
    _scale_blocks[grid](stored, values, scales, *stored.shape[1:], transposed, SCALE_BLOCK, num_warps=8)
    return values, scales


@triton.jit
def _product_of_blocks(
    row_value_ptr,
    row_scale_ptr,
    block_value_ptr,
    block_scale_ptr,
    ends_ptr,
    out_ptr,
    R,
    N,
    K,
    GROUPS,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
):
    """A program computes ROWS rows and BLOCK columns of one group.

    Group e, whose rows begin at b, has the tiles of rows from b // ROWS + e on: enough of them, and known from the ends alone.
    """
    tiles, columns, blocks = R // ROWS + GROUPS, tl.cdiv(N, BLOCK), tl.cdiv(K, BLOCK)
    first_tile = tl.program_id(0) // (TILES * columns) * TILES
    beside = tl.minimum(tiles - first_tile, TILES)
    tile = first_tile + tl.program_id(0) % (TILES * columns) % beside
    column_block = tl.program_id(0) % (TILES * columns) // beside

    lane = tl.arange(0, LANES)
    later = lane < GROUPS - 1
    ends = tl.load(ends_ptr + lane, mask=later, other=0)
    group = tl.sum((later & (ends // ROWS + lane < tile)).to(tl.int32), 0)
    begin, end = tl.load(ends_ptr + group - 1, mask=group > 0, other=0), tl.load(ends_ptr + group)
    first = begin + (tile - begin // ROWS - group) * ROWS
    if first < end:
        row, column, k = first + tl.arange(0, ROWS), column_block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK)
        of_group, of_output = row < end, column < N
        x = row_value_ptr + row.to(tl.int64)[:, None] * K + k[None, :]
        w = block_value_ptr + (group.to(tl.int64) * N + column)[None, :] * K + k[:, None]
        row_scale, block_scale = row_scale_ptr + row, block_scale_ptr + (group.to(tl.int64) * columns + column_block) * blocks
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for block in range(blocks):
            inside = k < K - block * BLOCK
            left = tl.load(x, mask=of_group[:, None] & inside[None, :], other=0.0)
            right = tl.load(w, mask=of_output[None, :] & inside[:, None], other=0.0)
            scale = tl.load(row_scale, mask=of_group, other=0.0) * tl.load(block_scale)
            total += tl.dot(left, right) * scale[:, None]
            x += BLOCK
            w += BLOCK
            row_scale += R
            block_scale += 1
        place = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(place, total.to(out_ptr.dtype.element_ty), mask=of_group[:, None] & of_output[None, :])


def product_of_blocks(
    rows_RK: Tensor, row_scales: Tensor, weights_ENK: Tensor, weight_scales: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """See `grouped_mm`, (R, N) in `dtype`, of results of `scale_rows` and `scale_blocks`. Rows behind all groups are anything."""
    (rows, inputs), (groups, outputs) = rows_RK.shape, weights_ENK.shape[:2]
    product_RN = rows_RK.new_empty(rows, outputs, dtype=dtype)
    if product_RN.numel():
        grid = ((rows // ROWS + groups) * triton.cdiv(outputs, SCALE_BLOCK),)
        lanes = max(32, triton.next_power_of_2(groups))
        tensors, sizes = (rows_RK, row_scales, weights_ENK, weight_scales, ends_E), (rows, outputs, inputs, groups)
        constants = ROWS, SCALE_BLOCK, TILES_OF_ROWS, lanes
        _product_of_blocks[grid](*tensors, product_RN, *sizes, *constants, num_warps=8, num_stages=STAGES)
    return product_RN
