"""The grouped matrix product behind the experts: rows of each group times that group's matrix, in one call.

An own operator around torch's `grouped_mm`, because that one has no fp64, no fp32 under torch.compile (its shape function
takes bf16 only), leaves rows behind the last group uninitialised, refuses gradients of stride 0, and does not promise that the
product over no rows is zero.
R rows, E groups, K inputs, N outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .device import kind_of


@torch.library.custom_op("tokenyard::grouped_mm", mutates_args=())
def grouped_mm(rows_RK: Tensor, weights_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """(R, N): rows [ends[e-1], ends[e]) times weights[e].T. ends_E is int32 and ends with R."""
    if not len(rows_RK):
        return rows_RK.new_empty(0, weights_ENK.shape[1])
    if rows_RK.dtype == torch.float64:
        parts = zip(rows_RK.split(_sizes(ends_E)), weights_ENK, strict=True)
        return torch.cat([rows @ weights.T for rows, weights in parts])
    return F.grouped_mm(rows_RK, weights_ENK.transpose(1, 2), offs=ends_E)


@torch.library.custom_op("tokenyard::grouped_outer", mutates_args=())
def grouped_outer(left_RN: Tensor, right_RK: Tensor, ends_E: Tensor) -> Tensor:
    """(E, N, K): the product left.T @ right over the rows of each group; zeros for a group without rows."""
    if not len(left_RN):
        return left_RN.new_zeros(len(ends_E), left_RN.shape[1], right_RK.shape[1])
    if left_RN.dtype == torch.float64:
        sizes = _sizes(ends_E)
        return torch.stack([a.T @ b for a, b in zip(left_RN.split(sizes), right_RK.split(sizes), strict=True)])
    return _zero_without_rows(F.grouped_mm(left_RN.T, right_RK, offs=ends_E), ends_E)


def _zero_without_rows(product_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """In place: zeros for groups without rows. On CUDA a pass over all groups, since the host does not know which those are."""
    empty_E = ends_E == F.pad(ends_E[:-1], (1, 0))
    if kind_of(product_ENK) == "cpu":
        product_ENK[empty_E] = 0
        return product_ENK
    return product_ENK.masked_fill_(empty_E[:, None, None], 0)


def _sizes(ends_E: Tensor) -> list[int]:
    return torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()


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
