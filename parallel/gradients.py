"""Gradients over ranks: one rule for every parameter and every layout.

Each rank's gradient is its own contribution: that of the tokens (and heads, columns) it computed. The gradient of the global
loss is the SUM over the ranks that hold the same piece of the parameter, never a mean; FSDP has added its part already. The
norm counts each piece once.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, _foreach_mul_, _foreach_norm  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.tensor import DTensor

from .apply import Parallel, ShardedParameter, local
from .layout import ADDED_BY_ONE
from .mesh import Axis
from .progress import collective, in_phase, waiting
from .streams import on_device

BUCKET = 2**23
"""Elements that travel in one all-reduce: many small tensors cost latency, one huge copy costs memory."""


@contextmanager
def summed_over_copies(parallel: Parallel) -> Iterator[None]:
    """Around the backward pass that makes gradients final: each is added up over the ranks that hold copies of the parameter.

    A bucket departs as soon as its gradients are final, and all have landed at the end. Those of FSDP are final when they have been
    scattered. Every rank starts the same collectives in the same order: that of the graph, which all ranks have in common.
    """
    sums = _Sums(parallel)
    with_copies = [placed.parameter for bucket in sums.buckets for placed in bucket.members]
    hooks = [parameter.register_post_accumulate_grad_hook(sums.final) for parameter in with_copies]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    sums.finish()


@dataclass
class _Bucket:
    """Parameters of one type with copies on the same ranks; all or none are of FSDP, which makes gradients on its own stream."""

    axis: Axis
    members: list[ShardedParameter] = field(default_factory=list)
    elements: int = 0
    missing: float = 0
    """Members whose gradient is not final yet. Infinite with one that some ranks never have: such a bucket departs at the end."""
    work: Any = None

    def depart(self) -> None:
        gradients = [gradient_of(placed) for placed in self.members]
        flat = gradients[0]
        if len(gradients) > 1 or not flat.is_contiguous():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            # The gradients become views of what travels, which frees their own memory.
            for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
                gradient.data = part.view_as(gradient)
        with collective("all_reduce", self.axis):
            self.work = dist.all_reduce(flat, group=self.axis.group, async_op=True)


class _Sums:
    """Buckets in the order in which the backward pass fills them, from the last parameter to the first: so they depart."""

    def __init__(self, parallel: Parallel) -> None:
        self.buckets = sorted(_buckets(parallel), key=lambda bucket: bucket.missing == math.inf)
        self.waiting = list(self.buckets)
        self.of_parameter = {id(placed.parameter): bucket for bucket in self.buckets for placed in bucket.members}

    def final(self, parameter: Tensor) -> None:
        """The backward pass has made this gradient."""
        bucket = self.of_parameter[id(parameter)]
        assert bucket.work is None, "a gradient came after its bucket had departed"
        bucket.missing -= 1
        while self.waiting and not self.waiting[0].missing:
            self.waiting.pop(0).depart()

    @in_phase("exchange")
    @torch.no_grad()
    def finish(self) -> None:
        """What is left departs, with zeros for a parameter without gradient, and all land."""
        for bucket in self.waiting:
            bucket.depart()
        for bucket in self.buckets:
            with waiting(f"all_reduce of gradients over {bucket.axis.size} ranks"):
                bucket.work.wait()


def _buckets(parallel: Parallel) -> list[_Bucket]:
    """Those of the last parameters first."""
    buckets: list[_Bucket] = []
    last: dict[Any, _Bucket] = {}
    for name, placed in parallel.placed.items():
        if placed.copies.group is None:
            continue
        key = placed.copies, placed.parameter.dtype, isinstance(placed.parameter, DTensor)
        elements = local(placed.parameter).numel()
        if key not in last or last[key].elements + elements > BUCKET:
            last[key] = _Bucket(placed.copies)
            buckets.insert(0, last[key])
        last[key].members.append(placed)
        last[key].elements += elements
        last[key].missing += math.inf if name.endswith(ADDED_BY_ONE) else 1
    return buckets


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


def gradient_of(placed: ShardedParameter) -> Tensor:
    """This rank's tensor of the gradient; zeros where no token took part."""
    if placed.parameter.grad is None:
        placed.parameter.grad = torch.zeros_like(placed.parameter)
    return local(placed.parameter.grad)
