"""Gradients of weights that are computed after the backward pass, for pipelines whose ranks fill waiting time with them.

Within `deferred_weight_gradients`, matrix products see their weight as a constant. So autograd computes the gradients of inputs,
and the product that gives the gradient of the weight is kept, with both of its factors, until `add_weight_gradients`. Weights that
are no matrices, and the embedding, have their gradients at once: they cost little.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor


class WeightGradient(NamedTuple):
    """A gradient to be computed."""

    weight: Tensor
    """The weight, or what was made of it (a cast, a view), to which the graph goes back from here."""
    product: Callable[[], Tensor]


_kept: list[WeightGradient] | None = None


@contextmanager
def deferred_weight_gradients() -> Iterator[list[WeightGradient]]:
    """Within, forward and backward passes leave gradients of weights; backward passes append them to the list that this yields."""
    global _kept
    _kept = []
    try:
        yield _kept
    finally:
        _kept = None


def defers(x: Tensor, weight: Tensor) -> bool:
    """Whether the gradient of `weight` in a product with x is deferred. If x has no gradient, no backward pass comes here."""
    return _kept is not None and x.requires_grad and weight.requires_grad and torch.is_grad_enabled()


def defer(weight: Tensor, product: Callable[[], Tensor]) -> None:
    """Keeps a gradient for later. Called in a backward pass."""
    assert _kept is not None, "a backward pass after `deferred_weight_gradients`"
    _kept.append(WeightGradient(weight, product))


def defer_product(y: Tensor, x: Tensor, weight: Tensor, gradient: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Returns y, a product of x with the constant `weight`, whose backward pass defers `gradient` of its own gradient and x."""
    return _DeferProduct.apply(y, x, (weight,), gradient)  # pyright: ignore[reportReturnType]


def add_weight_gradients(gradients: list[WeightGradient]) -> None:
    """Computes gradients and adds them to those of the weights, one after the other in the order of a backward pass. Empties the
    list, since each keeps much memory.
    """
    gradients.reverse()
    while gradients:
        weight, product = gradients.pop()
        with torch.no_grad():
            gradient = product().to(weight.dtype)
        torch.autograd.backward(weight, gradient)


class _DeferProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: tuple[Tensor], gradient: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The weight is in a tuple, so that it is no input in the graph."""
        ctx.save_for_backward(x)
        (ctx.weight,), ctx.gradient = weight, gradient
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        defer(ctx.weight, partial(ctx.gradient, grads[0], x.detach()))
        return grads[0], None, None, None
