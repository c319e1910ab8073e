"""The type in which matrix products are made.

A CPU without instructions for bf16 would emulate them, at a fifth of the speed of fp32 (docs/performance.md). There, products of
bf16 numbers are made in fp32 and rounded once, as processors with such instructions do it inside.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .processor import multiplies_bf16


def arithmetic(x: Tensor) -> torch.dtype:
    """What x has to be cast to for a product: its own type, or fp32 for bf16 on such a CPU."""
    emulated = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not multiplies_bf16()
    return torch.float32 if emulated else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for x of shape (..., inputs) and weight of shape (outputs, inputs), in the type of x."""
    weight = weight.to(x.dtype)
    if arithmetic(x) == x.dtype:
        return F.linear(x, weight, bias)
    y = _WideLinear.apply(x, weight)
    return y if bias is None else y + bias  # pyright: ignore[reportReturnType, reportOperatorIssue]


class _WideLinear(torch.autograd.Function):
    """Keeps what `F.linear` keeps: no wider copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(arithmetic(x)), weight.to(arithmetic(x))).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad = grads[0].to(arithmetic(x))
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        return grad_x, (grad.flatten(0, -2).T @ x.flatten(0, -2).to(grad.dtype)).to(weight.dtype)
