"""Triton kernels on token rows: copies of tokens, the weighted sum of each token's rows, its backward pass, zeros for groups
without rows, and copies into the memory of other ranks.

T tokens, D width, K choices per token, R rows, E experts. Sums are computed in fp32. A program owns what it writes, so nothing is
added atomically and every run gives the same bits. Each input is read once and each output written once.
"""

# Launches pass numbers where kernels declare constants.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_COLUMNS = 1024
"""Columns of a program: with 4 warps, each thread loads 16 bytes of bf16."""
ZEROING_PROGRAMS = 64
"""Programs for each group."""


def columns_of_program(width: int) -> int:
    """The columns, a power of two, that a program takes at a time."""
    return min(MOST_COLUMNS, 1 << (width - 1).bit_length())


@triton.jit
def _copy_rows(x_ptr, slot_ptr, filled_ptr, out_ptr, T, D, K: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    if program < T:
        x = tl.load(x_ptr + program * D + columns, mask=inside)
        for k in tl.static_range(K):
            slot = tl.load(slot_ptr + program * K + k)
            tl.store(out_ptr + slot * D + columns, x, mask=inside & (slot >= 0))
    elif PADDED:
        row = program - T
        if not tl.load(filled_ptr + row):
            tl.store(out_ptr + row * D + columns, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=inside)


def copy_rows(x_TD: Tensor, slot_TK: Tensor, filled_R: Tensor | None, rows: int) -> Tensor:
    """(R, D): see `dispatch.gather_rows`. Reads each token once, and writes it to its slots."""
    x_TD, (tokens, top_k), width = x_TD.contiguous(), slot_TK.shape, x_TD.shape[1]
    rows_RD = x_TD.new_empty(rows, width)
    if rows_RD.numel():
        block = columns_of_program(width)
        programs = tokens if filled_R is None else tokens + rows
        tensors = x_TD, slot_TK.contiguous(), filled_R, rows_RD
        _copy_rows[programs, triton.cdiv(width, block)](*tensors, tokens, width, top_k, filled_R is not None, block)
    return rows_RD


@triton.jit
def _sum_rows(y_ptr, slot_ptr, weight_ptr, out_ptr, D, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        slot = tl.load(slot_ptr + token * K + k)
        row = tl.load(y_ptr + slot * D + columns, mask=inside & (slot >= 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weight_ptr + token * K + k)
        total += row
    tl.store(out_ptr + token * D + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def sum_rows(y_RD: Tensor, slot_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """(T, D): see `dispatch.sum_rows`. A choice whose slot is negative adds nothing."""
    y_RD, (tokens, top_k), width = y_RD.contiguous(), slot_TK.shape, y_RD.shape[1]
    out_TD = y_RD.new_empty(tokens, width)
    weights_TK = None if weights_TK is None else weights_TK.float().contiguous()
    if out_TD.numel():
        block = columns_of_program(width)
        grid = tokens, triton.cdiv(width, block)
        _sum_rows[grid](y_RD, slot_TK.contiguous(), weights_TK, out_TD, width, top_k, weights_TK is not None, block)
    return out_TD


@triton.jit
def _unpermute_backward(
    grad_ptr,
    y_ptr,
    token_ptr,
    filled_ptr,
    weight_ptr,
    grad_y_ptr,
    dot_ptr,
    D,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token, weight = tl.load(token_ptr + row), tl.load(weight_ptr + row)
    filled = tl.load(filled_ptr + row) if PADDED else True
    dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < D
        grad = tl.load(grad_ptr + token * D + columns, mask=inside & filled, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * D + columns, mask=inside & filled, other=0.0).to(tl.float32)
        dot += grad * y
        tl.store(grad_y_ptr + row * D + columns, (grad * weight).to(grad_y_ptr.dtype.element_ty), mask=inside)
    tl.store(dot_ptr + row, tl.sum(dot, 0))


def unpermute_backward(
    grad_TD: Tensor, y_RD: Tensor, token_R: Tensor, filled_R: Tensor | None, weights_R: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the rows (R, D) and of their weights (R,), in fp32, from that of `sum_rows`; zeros for padding."""
    grad_TD, y_RD, (rows, width) = grad_TD.contiguous(), y_RD.contiguous(), y_RD.shape
    grad_y_RD, grad_weights_R = torch.empty_like(y_RD), weights_R.new_empty(rows, dtype=torch.float32)
    if y_RD.numel():
        tensors = grad_TD, y_RD, token_R, filled_R, weights_R.float(), grad_y_RD, grad_weights_R
        _unpermute_backward[rows,](*tensors, width, filled_R is not None, columns_of_program(width))
    return grad_y_RD, grad_weights_R


@triton.jit
def _zero_empty_groups(product_ptr, ends_ptr, SIZE, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    group = tl.program_id(1)
    begin = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    if tl.load(ends_ptr + group) == begin:
        zeros = tl.zeros([BLOCK], product_ptr.dtype.element_ty)
        for start in range(tl.program_id(0) * BLOCK, SIZE, PROGRAMS * BLOCK):
            elements = start + tl.arange(0, BLOCK)
            tl.store(product_ptr + group.to(tl.int64) * SIZE + elements, zeros, mask=elements < SIZE)


def zero_empty_groups(product_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """Zeroes the groups without rows, in place. Touches no other group: the host need not know which they are."""
    size = product_ENK[0].numel()
    grid = min(ZEROING_PROGRAMS, triton.cdiv(size, MOST_COLUMNS)), len(ends_E)
    _zero_empty_groups[grid](product_ENK, ends_E, size, grid[0], MOST_COLUMNS)
    return product_ENK


@triton.jit
def _put_rows(x_ptr, index_ptr, rank_ptr, row_ptr, address_ptr, D, INDEXED: tl.constexpr, BLOCK: tl.constexpr):
    """A program puts columns of one row."""
    i = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.load(rank_ptr + i)
    if rank >= 0:
        source = tl.load(index_ptr + i) if INDEXED else i
        x = tl.load(x_ptr + source * D + columns, mask=columns < D)
        memory = tl.load(address_ptr + rank).to(tl.pointer_type(x_ptr.dtype.element_ty))
        there = tl.multiple_of(memory, 16) + tl.load(row_ptr + i) * D  # 16 bytes are stored at a time if 16 divides D
        tl.store(there + columns, x, mask=columns < D)


def put_rows(x: Tensor, index_R: Tensor | None, rank_R: Tensor, row_R: Tensor, address_N: Tensor) -> None:
    """Row i of R, x[index_R[i]] (None: x[i]), becomes row row_R[i] of the rows at address_N[rank_R[i]]; a rank of -1 takes none.

    16 divides the addresses.
    """
    width = x[0].numel() if len(x) else 0
    if len(rank_R) and width:
        block = columns_of_program(width)
        grid = len(rank_R), triton.cdiv(width, block)
        _put_rows[grid](x.contiguous(), index_R, rank_R, row_R, address_N, width, index_R is not None, block)
