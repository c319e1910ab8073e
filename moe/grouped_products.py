"""The grouped matrix product: the rows of each group times the matrix of that group, in one call.

A custom operator around torch's `grouped_mm`, which has no fp64, no fp32 under torch.compile (its shape function takes bf16 only),
leaves rows behind the last group uninitialised, refuses gradients of stride 0, and does not guarantee that the product over no rows
is zero. R rows, E groups, K inputs, N outputs.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .device import kind_of, uses_kernels


@torch.library.custom_op("tokenyard::grouped_mm", mutates_args=())
def grouped_mm(rows_RK: Tensor, weights_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """(R, N): rows [ends[e-1], ends[e]) times weights[e].T; ends_E is int32.

    Rows behind the last end come out as zeros on a CPU, and on a GPU as anything.
    """
    if not len(rows_RK):
        return rows_RK.new_empty(0, weights_ENK.shape[1])
    if rows_RK.dtype == torch.float64:
        *parts, behind = rows_RK.split(_sizes(ends_E, len(rows_RK)))
        products = [rows @ weights.T for rows, weights in zip(parts, weights_ENK, strict=True)]
        return torch.cat([*products, behind.new_zeros(len(behind), weights_ENK.shape[1])])
    outputs = weights_ENK.shape[1]
    if short := _short_of_aligned(rows_RK, rows_RK.shape[1], outputs):
        rows_RK, weights_ENK = F.pad(rows_RK, (0, short[0])), F.pad(weights_ENK, (0, short[0], 0, short[1]))
    product_RN = F.grouped_mm(rows_RK, weights_ENK.transpose(1, 2), offs=ends_E)[:, :outputs].contiguous()
    if kind_of(product_RN) == "cpu":
        product_RN[ends_E[-1] :] = 0
    return product_RN


@torch.library.custom_op("tokenyard::grouped_outer", mutates_args=())
def grouped_outer(left_RN: Tensor, right_RK: Tensor, ends_E: Tensor) -> Tensor:
    """(E, N, K): left.T @ right over the rows of each group; zeros for a group without rows."""
    if not len(left_RN):
        return left_RN.new_zeros(len(ends_E), left_RN.shape[1], right_RK.shape[1])
    if left_RN.dtype == torch.float64:
        sizes = _sizes(ends_E, len(left_RN))
        *groups, _ = zip(left_RN.split(sizes), right_RK.split(sizes), strict=True)
        return torch.stack([left.T @ right for left, right in groups])
    height, width = left_RN.shape[1], right_RK.shape[1]
    if short := _short_of_aligned(left_RN, height, width):
        padded_ENK = F.grouped_mm(F.pad(left_RN, (0, short[0])).T, F.pad(right_RK, (0, short[1])), offs=ends_E)
        return _zero_empty_groups(padded_ENK[:, :height, :width].contiguous(), ends_E)
    return _zero_empty_groups(F.grouped_mm(left_RN.T, right_RK, offs=ends_E), ends_E)


def _short_of_aligned(like: Tensor, *widths: int) -> list[int] | None:
    """Returns the zeros to append to each width, since torch's grouped_mm wants rows of 16 bytes; None if it needs none."""
    unit = 16 // like.element_size()
    short = [-width % unit for width in widths]
    return short if any(short) else None


def _zero_empty_groups(product_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """Zeroes groups without rows, in place. The host of a GPU does not know which they are."""
    if uses_kernels(product_ENK):
        from .kernels import rows

        return rows.zero_empty_groups(product_ENK, ends_E)
    empty_E = ends_E == F.pad(ends_E[:-1], (1, 0))
    if kind_of(product_ENK) == "cpu":
        product_ENK[empty_E] = 0
        return product_ENK
    return product_ENK.masked_fill_(empty_E[:, None, None], 0)


def _sizes(ends_E: Tensor, rows: int) -> list[int]:
    """Returns the rows of each group, and those behind the last one."""
    ends = [0, *ends_E.tolist(), rows]
    return [end - begin for begin, end in pairwise(ends)]


@grouped_mm.register_fake
def _(rows_RK: Tensor, weights_ENK: Tensor, ends_E: Tensor) -> Tensor:
    return rows_RK.new_empty(rows_RK.shape[0], weights_ENK.shape[1])


@grouped_outer.register_fake
def _(left_RN: Tensor, right_RK: Tensor, ends_E: Tensor) -> Tensor:
    return left_RN.new_empty(ends_E.shape[0], left_RN.shape[1], right_RK.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows_RK, weights_ENK, ends_E = ctx.saved_tensors
    grad_RN = grad_RN.contiguous()
    grad_rows = grouped_mm(grad_RN, weights_ENK.transpose(1, 2), ends_E) if ctx.needs_input_grad[0] else None
    grad_weights = grouped_outer(grad_RN, rows_RK, ends_E) if ctx.needs_input_grad[1] else None
    return grad_rows, grad_weights, None


grouped_mm.register_autograd(_backward, setup_context=_save)
