"""Gradients over ranks: one rule for every parameter and every layout.

A rank's gradient is the contribution of the tokens (and heads, columns) that it computed. The gradient of the global loss is the
SUM over the replicas of a shard, never a mean; FSDP has summed over its own ranks already. The norm counts each shard once.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, _foreach_mul_, _foreach_norm, nn  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.tensor import DTensor

from .apply import Parallel, ShardedParameter, gradient_of, local
from .collectives import all_reduce
from .layout import ADDED_BY_ONE, stays_whole
from .mesh import Axis
from .progress import collective, in_phase, waiting
from .streams import on_device

BUCKET = 2**23
"""Elements in one all-reduce: many small ones cost latency, one large one costs memory."""


@contextmanager
def gradient_all_reduce(parallel: Parallel) -> Iterator[None]:
    """Wraps the last backward pass of a step (in a pipeline the passes from the first one that is the last of its stage on), and
    sums each gradient over the replicas of its parameter.

    The all-reduce of a bucket starts as soon as all its gradients are final (for FSDP: reduce-scattered), and every one is complete
    on exit. Autograd visits the graph in the same order on all ranks, so they start the same collectives in the same order.
    """
    reducer = _Reducer(parallel)
    replicated = [sharded.parameter for bucket in reducer.buckets for sharded in bucket.members]
    hooks = [parameter.register_post_accumulate_grad_hook(reducer.on_gradient) for parameter in replicated]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    reducer.finish()


@dataclass
class _Bucket:
    """Parameters of one dtype with the same replicas. All or none are FSDP's, whose gradients are made on a stream of its own."""

    axis: Axis
    members: list[ShardedParameter] = field(default_factory=list)
    elements: int = 0
    missing: float = 0
    """Members whose gradient is not final. Infinite if some ranks never have them, or if they come at another time on other stages
    of a pipeline: the all-reduce then starts at the end.
    """
    work: Any = None

    def start(self) -> None:
        gradients = [gradient_of(sharded) for sharded in self.members]
        flat = gradients[0]
        if len(gradients) > 1 or not flat.is_contiguous():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            # The gradients become views of the flat tensor, which frees their own memory.
            for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
                gradient.data = part.view_as(gradient)
        if self.axis.indirect:
            all_reduce(flat, self.axis)
            return
        with collective("all_reduce", self.axis):
            self.work = dist.all_reduce(flat, group=self.axis.group, async_op=True)


class _Reducer:
    """Starts buckets in the order in which the backward pass completes them: from the last parameter to the first."""

    def __init__(self, parallel: Parallel) -> None:
        self.buckets = sorted(_buckets(parallel), key=lambda bucket: bucket.missing == math.inf)
        self.not_started = list(self.buckets)
        self.bucket_of = {id(sharded.parameter): bucket for bucket in self.buckets for sharded in bucket.members}
        self.pipeline = parallel.pipeline
        self.names = {id(sharded.parameter): name for name, sharded in parallel.parameters.items()}

    def on_gradient(self, parameter: Tensor) -> None:
        """Called when a backward pass has added to the gradient of a parameter."""
        if self.pipeline is not None and not self.pipeline.has_ended(self.names[id(parameter)]):
            return
        bucket = self.bucket_of[id(parameter)]
        assert bucket.work is None, "a gradient came after its bucket had departed"
        bucket.missing -= 1
        while self.not_started and not self.not_started[0].missing:
            self.not_started.pop(0).start()

    @in_phase("exchange")
    @torch.no_grad()
    def finish(self) -> None:
        """Starts the remaining buckets, with zeros for parameters without a gradient, and waits for all."""
        for bucket in self.not_started:
            bucket.start()
        for bucket in self.buckets:
            with waiting(f"all_reduce of gradients over {bucket.axis.size} ranks"):
                if bucket.work is not None:
                    bucket.work.wait()


def _buckets(parallel: Parallel) -> list[_Bucket]:
    """Returns the buckets of all parameters that have replicas, those of the last parameters first."""
    copied = set[str]() if parallel.pipeline is None else parallel.pipeline.copied
    buckets: list[_Bucket] = []
    current: dict[Any, _Bucket] = {}
    for name, sharded in parallel.parameters.items():
        if sharded.replicas.alone:
            continue
        # Apart from the others, which need not wait for the end; one group after the other would make the backward pass wait.
        late = name.endswith(ADDED_BY_ONE) or name in copied or sharded.replicas.indirect
        key = sharded.replicas, sharded.gradient_dtype or sharded.parameter.dtype, isinstance(sharded.parameter, DTensor), late
        elements = local(sharded.parameter).numel()
        if key not in current or current[key].elements + elements > BUCKET:
            current[key] = _Bucket(sharded.replicas)
            buckets.insert(0, current[key])
        bucket = current[key]
        bucket.members.append(sharded)
        bucket.elements += elements
        bucket.missing += math.inf if late else 1
    return buckets


def squared_norm(parallel: Parallel) -> Tensor:
    """Returns this rank's share of the squared norm of all gradients, in fp64. The shares of all ranks sum to the squared norm."""
    gradients = [gradient_of(sharded) for sharded in parallel.parameters.values()]
    dtypes = {gradient.dtype for gradient in gradients}
    wide = max(torch.float32, *dtypes, key=lambda dtype: dtype.itemsize) if torch.bfloat16 in dtypes else None
    norms = torch.stack([norm.double() for norm in _foreach_norm(gradients, dtype=wide)])
    replicas = on_device(torch.tensor([sharded.replicas.size for sharded in parallel.parameters.values()]), norms.device)
    return (norms.square() / replicas).sum()


def clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """Returns what gradients of this norm are multiplied by."""
    return (clip_norm / (norm + 1e-6)).clamp(max=1.0)


def scale_gradients(parallel: Parallel, factor: Tensor) -> None:
    """Multiplies all gradients by a scalar, in place. Those in bf16 are multiplied in fp32 and rounded."""
    gradients = [gradient_of(sharded) for sharded in parallel.parameters.values()]
    wide = [gradient for gradient in gradients if gradient.dtype != torch.bfloat16]
    if wide:  # a first stage may have the embedding alone
        _foreach_mul_(wide, factor.to(wide[0].dtype))
    for gradient in gradients:
        if gradient.dtype == torch.bfloat16:
            gradient.mul_(factor.float().view(1))  # a scalar would be rounded to bf16 first


def narrow_gradients(parallel: Parallel) -> None:
    """Makes gradients bf16 from now on, as autograd adds to them, or as soon as FSDP has summed them over its ranks, wide.

    Those of routers, norms and biases, which are small, stay as wide as the weights.
    """
    for name, sharded in parallel.parameters.items():
        if stays_whole(name, len(sharded.metadata.shape)):
            continue
        sharded.gradient_dtype = torch.bfloat16
        if isinstance(sharded.parameter, DTensor):
            sharded.parameter.grad_dtype = None  # any: FSDP assigns the wide sum
            sharded.parameter.register_post_accumulate_grad_hook(_round)
        else:
            sharded.parameter.grad_dtype = torch.bfloat16


def _round(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    parameter.grad = parameter.grad.to(torch.bfloat16)
