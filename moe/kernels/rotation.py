"""Triton kernel of the rotary embedding. B sequences, H heads, S tokens, h width of a head, r rotated dimensions of it."""

# Launches pass numbers where kernels declare constants.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ELEMENTS = 1024
"""Elements of a program: pairs of dimensions, for as many heads."""


@triton.jit
def _rotate(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    heads,
    x_batch,
    x_head,
    x_token,
    out_batch,
    out_head,
    out_token,
    table_batch,
    WIDTH,
    HALF,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    token, head, batch = (
        tl.program_id(0).to(tl.int64),
        tl.program_id(1) * HEADS + tl.arange(0, HEADS),
        tl.program_id(2).to(tl.int64),
    )
    x_ptr += batch * x_batch + token * x_token
    out_ptr += batch * out_batch + token * out_token
    pair = tl.arange(0, PAIRS)
    table = batch * table_batch + token * HALF + pair
    cos = tl.load(cos_ptr + table, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + table, mask=pair < HALF, other=0.0)[None, :]
    if INVERSE:
        sin = -sin
    x_rows, out_rows = x_ptr + head[:, None] * x_head, out_ptr + head[:, None] * out_head
    exists = (head < heads)[:, None]
    if INTERLEAVED:  # loads whole rows, as single loads of every other number take six times as long
        column = tl.arange(0, 2 * PAIRS)[None, :]
        inside = exists & (column < 2 * HALF)
        both = tl.load(x_rows + column, mask=inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [HEADS, PAIRS, 2]))
        turned = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [HEADS, 2 * PAIRS])
        tl.store(out_rows + column, turned.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        first, inside = pair[None, :], exists & (pair < HALF)[None, :]
        a = tl.load(x_rows + first, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_rows + first + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_rows + first, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out_rows + first + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=inside)
    if REST:
        column = 2 * HALF + tl.arange(0, REST)[None, :]
        inside = exists & (column < WIDTH)
        tl.store(out_rows + column, tl.load(x_rows + column, mask=inside), mask=inside)


def rotate(x_BHSh: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """(B, H, S, h), in the memory layout of x: see `rotary.rotate`. `inverse` rotates back, which is the backward pass.

    cos and sin are (S, r / 2) or (B, 1, S, r / 2), in fp32.
    """
    x_BHSh = x_BHSh if x_BHSh.stride(-1) == 1 else x_BHSh.contiguous()
    out_BHSh = torch.empty_like(x_BHSh)
    (batch, heads, tokens, width), half = x_BHSh.shape, cos.shape[-1]
    if not x_BHSh.numel():
        return out_BHSh
    pairs = triton.next_power_of_2(half)
    block = min(triton.next_power_of_2(heads), max(1, MOST_ELEMENTS // pairs))
    rest = triton.next_power_of_2(width - 2 * half) if width > 2 * half else 0
    strides = *x_BHSh.stride()[:3], *out_BHSh.stride()[:3], tokens * half if cos.dim() == 4 else 0
    grid = tokens, triton.cdiv(heads, block), batch
    flags = width, half, interleaved, inverse, block, pairs, rest
    _rotate[grid](x_BHSh, cos.contiguous(), sin.contiguous(), out_BHSh, heads, *strides, *flags)
    return out_BHSh
