"""Triton kernels between fp32 and bf16: the parts of a matrix for exact products on tensor cores, and sums of narrow gradients.

An fp32 number has 24 bits and a bf16 number 8, so three parts are the number exactly: the nearest bf16 number, the nearest to what
is left, and the rest (Henry, Tang and Heinecke 2019).
"""

# Launches pass numbers where kernels declare constants.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _bf16_parts(x_ptr, parts_ptr, SIZE, C, STRIDE, STEP, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < SIZE
    left = tl.load(x_ptr + element, mask=inside, other=0.0).to(tl.float32)
    place = parts_ptr + element // C * STRIDE + element % C
    for order in tl.static_range(3):
        part = left.to(tl.bfloat16)
        for index in tl.static_range(len(PARTS)):
            if PARTS[index] == order:
                tl.store(place + index * STEP, part, mask=inside)
        left -= part.to(tl.float32)


def bf16_parts(x_RC: Tensor, parts: list[int], dim: int) -> Tensor:
    """bf16 (len(parts) * R, C) if `dim` is 0, (R, len(parts) * C) if it is 1: the parts 0, 1 or 2 in the given order."""
    x_RC, (rows, columns) = x_RC.contiguous(), x_RC.shape
    size = (rows * len(parts), columns) if dim == 0 else (rows, columns * len(parts))
    parts_RC = x_RC.new_empty(size, dtype=torch.bfloat16)
    stride, step = (columns, rows * columns) if dim == 0 else (columns * len(parts), columns)
    if x_RC.numel():
        grid = (triton.cdiv(x_RC.numel(), BLOCK),)
        _bf16_parts[grid](x_RC, parts_RC, x_RC.numel(), columns, stride, step, tuple(parts), BLOCK)
    return parts_RC


@triton.jit
def _add_narrow(total_ptr, x_ptr, SIZE, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < SIZE
    total = tl.load(total_ptr + element, mask=inside) + tl.load(x_ptr + element, mask=inside).to(tl.float32)
    tl.store(total_ptr + element, total, mask=inside)


def add_narrow(total: Tensor, x: Tensor) -> None:
    """Adds x, in bf16 or fp16, to `total` in fp32, in place; both are contiguous. Moves 10 bytes for each element."""
    _add_narrow[triton.cdiv(x.numel(), BLOCK),](total, x, x.numel(), BLOCK)
