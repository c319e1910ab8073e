"""Weights in the dtype of the activations, and their gradients in that of the weights.

The micro-batches of a step use the same weights. Inside `shared_casts` each weight is cast once, and later gradients are added to
the first as they are, which for bf16 and fp32 moves 10 bytes for each weight instead of 18.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .device import uses_kernels
from .kernels import operators

_shared: dict[tuple[int, torch.dtype], Tensor] | None = None
"""Casts by the identity of the weight and dtype."""
_noted: list[Tensor] | None = None


@contextmanager
def shared_casts() -> Iterator[None]:
    """Within, weights do not change, and casts are kept: as much memory as the backward pass of one micro-batch needs anyway."""
    global _shared
    _shared = {}
    try:
        yield
    finally:
        _shared = None


@contextmanager
def noted_casts() -> Iterator[list[Tensor]]:
    """Within, casts of weights are appended to the list that this yields."""
    global _noted
    before, _noted = _noted, list[Tensor]()
    try:
        yield _noted
    finally:
        _noted = before


def weight_as(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `weight.to(dtype)`. Differentiable."""
    if torch.compiler.is_compiling() or weight.dtype == dtype:
        return weight.to(dtype)
    cast: Any = weight.to(dtype) if _shared is None else _SharedCast.apply(weight, dtype)
    if _noted is not None:
        _noted.append(cast.detach())
    return cast


class _SharedCast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        assert _shared is not None
        ctx.save_for_backward(weight)
        key = id(weight), dtype
        if key not in _shared:
            _shared[key] = weight.to(dtype)
        return _shared[key].view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Hooks of the weight that wait for its gradient are called nevertheless: autograd accumulates None."""
        (weight,), (grad,) = ctx.saved_tensors, grads
        if weight.grad is None:
            return grad.to(weight.grad_dtype), None
        add(weight.grad, grad)
        return None, None


def add(total: Tensor, x: Tensor) -> None:
    """Adds x to `total`, in place."""
    if uses_kernels(total) and total.dtype == torch.float32 and total.is_contiguous():
        operators.add_narrow(total, x.contiguous())
    else:
        total.add_(x)
