"""Triton kernels of the cross entropy: sums over the vocabulary, and the gradient, which overwrites the logits. In fp32 inside.

T tokens, V columns of the vocabulary on this rank. A program owns what it writes, so every run gives the same bits.
"""

# Launches pass numbers where kernels declare constants.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Columns that a program takes at a time: with 8 warps, each thread loads 16 bytes of bf16 twice."""
LEAST = tl.constexpr(-3e38)
"""Below the logits that are finite: maxima start with it, since the difference of two infinities is not a number."""


@triton.jit
def _reduce_logits(logits_ptr, target_ptr, largest_ptr, exps_ptr, target_logit_ptr, V, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    largest, exps = tl.full([BLOCK], LEAST, tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + token * V + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(largest, logits)
        exps = exps * tl.exp(largest - higher) + tl.exp(logits - higher)
        largest = higher
    most = tl.max(largest, 0)
    tl.store(largest_ptr + token, most)
    tl.store(exps_ptr + token, tl.sum(exps * tl.exp(largest - most), 0))
    target = tl.load(target_ptr + token)
    target_logit = tl.load(logits_ptr + token * V + target, mask=target >= 0, other=0.0)
    tl.store(target_logit_ptr + token, target_logit.to(tl.float32))


def reduce_logits(logits_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `operators.reduce_logits`."""
    tokens, columns = logits_TV.shape
    largest_T, exps_T, target_logits_T = (logits_TV.new_empty(tokens, dtype=torch.float32) for _ in range(3))
    if tokens:
        tensors = logits_TV, target_T, largest_T, exps_T, target_logits_T
        _reduce_logits[tokens,](*tensors, columns, block_of(columns), num_warps=8)
    return largest_T, exps_T, target_logits_T


@triton.jit
def _cross_entropy_gradient(logits_ptr, target_ptr, largest_ptr, scale_ptr, V, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + token * V + columns, mask=columns < V, other=0.0).to(tl.float32)
    gradient = tl.exp(logits - tl.load(largest_ptr + token)) * tl.load(scale_ptr + token)
    gradient = tl.where(columns == tl.load(target_ptr + token), gradient - 1.0, gradient)
    tl.store(logits_ptr + token * V + columns, gradient.to(logits_ptr.dtype.element_ty), mask=columns < V)


def cross_entropy_gradient(logits_TV: Tensor, target_T: Tensor, largest_T: Tensor, scale_T: Tensor) -> None:
    """See `operators.cross_entropy_gradient`."""
    tokens, columns = logits_TV.shape
    if tokens:
        block = block_of(columns)
        grid = tokens, triton.cdiv(columns, block)
        _cross_entropy_gradient[grid](logits_TV, target_T, largest_T, scale_T, columns, block, num_warps=8)


def block_of(columns: int) -> int:
    """The columns, a power of two, that a program takes at a time."""
    return min(BLOCK, 1 << (columns - 1).bit_length())
