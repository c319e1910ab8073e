"""Gradients over ranks: one rule for every parameter and every layout.

Each rank's gradient is its own contribution: that of the tokens (and heads, columns) it computed. The gradient of the global
loss is the SUM over the ranks that hold the same piece of the parameter, never a mean; FSDP has added its part already. The
norm counts each piece once.
"""

from collections import defaultdict

import torch
from torch import Tensor, _foreach_mul_, _foreach_norm  # pyright: ignore[reportPrivateImportUsage]

from .apply import Parallel, Placed, local
from .collectives import sum_over
from .mesh import Axis
from .streams import on_device

BUCKET = 2**23
"""Elements that travel in one all-reduce: many small tensors cost latency, one huge copy costs memory."""


def reduce_gradients(parallel: Parallel) -> None:
    """Add up each gradient over the ranks that hold copies of the parameter. Same order on every rank."""
    by_axis: dict[tuple[Axis, torch.dtype], list[Tensor]] = defaultdict(list)
    for placed in parallel.placed.values():
        gradient = gradient_of(placed)
        if placed.copies.group is not None:
            by_axis[placed.copies, gradient.dtype].append(gradient)
    for (axis, _), gradients in by_axis.items():
        for bucket in _buckets(gradients):
            _sum_bucket(bucket, axis)


def squared_norm(parallel: Parallel) -> Tensor:
    """This rank's share of the squared norm of all gradients, fp64: the shares of all ranks add up to it."""
    gradients = [gradient_of(placed) for placed in parallel.placed.values()]
    norms = torch.stack([norm.double() for norm in _foreach_norm(gradients)])
    copies = on_device(torch.tensor([placed.copies.size for placed in parallel.placed.values()]), norms.device)
    return (norms.square() / copies).sum()


def scale_gradients(parallel: Parallel, factor: Tensor) -> None:
    """Multiply all gradients by a scalar, in place."""
    gradients = [gradient_of(placed) for placed in parallel.placed.values()]
    _foreach_mul_(gradients, factor.to(gradients[0].dtype))


def gradient_of(placed: Placed) -> Tensor:
    """This rank's tensor of the gradient; zeros where no token took part."""
    if placed.parameter.grad is None:
        placed.parameter.grad = torch.zeros_like(placed.parameter)
    return local(placed.parameter.grad)


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if buckets[-1] and sum(t.numel() for t in buckets[-1]) + tensor.numel() > BUCKET:
            buckets.append([])
        buckets[-1].append(tensor)
    return buckets


def _sum_bucket(tensors: list[Tensor], axis: Axis) -> None:
    if len(tensors) == 1 and tensors[0].is_contiguous():
        sum_over(tensors[0], axis)
        return
    flat = sum_over(torch.cat([tensor.flatten() for tensor in tensors]), axis)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
