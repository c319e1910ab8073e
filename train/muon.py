"""Muon: matrices move along their orthogonalised momentum (Jordan et al. 2024), all other parameters as AdamW moves them.

An update is scaled by 0.2 sqrt(max(rows, columns)), which makes its root mean square that of AdamW's, so learning rate and weight
decay are AdamW's (Moonlight; Liu et al. 2025, arXiv:2502.16982). Each rank has the momentum of its own pieces of parameters; pieces
travel to the owner of a matrix, and those of its update back (matrix_owners.py).

N matrices of A rows and B columns.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, _foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.tensor import DTensor

from ..moe.device import kind_of
from ..parallel.apply import Parallel, ShardedParameter, gradient_of, local
from ..parallel.collectives import start_swap
from ..parallel.layout import DENSE, digits, members, shard_of
from ..parallel.mesh import Axis, Mesh
from ..parallel.progress import collective
from .config.config import OptimizerConfig
from .config.matrices import MuonProducts, segments
from .matrix_owners import Bucket, Layout, Local, Owned, Rectangle, Sharding, buckets

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""a, b, c of Jordan et al.: they bring singular values into about [0.7, 1.2] in five steps, not to 1."""
SMALLEST = 1e-7
"""Matrices with a smaller norm have a smaller update."""
SCALE = 0.2
"""The root mean square of AdamW's updates, in learning rates (Liu et al. 2025, section 2.2)."""


def orthogonalize(x_NAB: Tensor, scale: float = 1.0) -> Tensor:
    """Returns U V^T of each matrix U S V^T, roughly, times `scale`, by Newton-Schulz in the dtype of `x_NAB`.

    A step X -> a X + b (X X^T) X + c (X X^T)^2 X is P X with P = a + b G + c G^2 and G = X X^T, on the smaller side. The G of the
    next step is P G P, so the steps of a segment need X once (Gram Newton-Schulz, dao-lab.ai/blog/2026/gram-newton-schulz). A
    segment is at most two long: where roundings make G negative, it grows twelvefold in a step. The norm of X is the root of the
    trace of its G.
    """
    _, rows, columns = x_NAB.shape
    tall, taken = rows > columns, segments((rows, columns))
    for number, steps in enumerate(taken):
        gram = x_NAB.mT @ x_NAB if tall else x_NAB @ x_NAB.mT
        factor: Tensor | float = scale if number == len(taken) - 1 else 1.0
        if number == 0:
            wide = torch.promote_types(gram.dtype, torch.float32)
            squared = gram.diagonal(dim1=1, dim2=2).sum(-1, dtype=wide).clamp(min=SMALLEST**2)[:, None, None]
            gram.div_(squared)
            factor = squared.rsqrt().mul_(factor)
        product = step = _step(gram)
        for _ in range(steps - 1):
            gram = step @ (step @ gram)
            step = _step(gram)
            product = step @ product
        product.mul_(factor)
        x_NAB = x_NAB @ product if tall else product @ x_NAB
    return x_NAB


def _step(gram: Tensor) -> Tensor:
    """Returns a + b G + c G^2."""
    a, b, c = COEFFICIENTS
    step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    step.diagonal(dim1=1, dim2=2).add_(a)
    return step


def update_scale(shape: tuple[int, int]) -> float:
    """Returns the factor of an orthogonalised matrix of this shape."""
    return SCALE * math.sqrt(max(shape))


class Muon(torch.optim.Optimizer):
    """Updates `named` itself and other parameters by `rest`. Its groups and states are those of both. Collective, as is `step`."""

    def __init__(
        self, config: OptimizerConfig, parallel: Parallel, named: Mapping[str, ShardedParameter], rest: torch.optim.Optimizer
    ) -> None:
        parameters = [sharded.parameter for sharded in named.values()]
        super().__init__(
            [{"params": parameters, "weight_decay": config.weight_decay}], {"lr": config.lr, "momentum": config.muon.momentum}
        )
        self.rest, self.named, self.axis = rest, dict(named), ranks_of_stage(parallel.mesh)
        rest.state.update((parameter, {"exp_avg": torch.zeros_like(parameter)}) for parameter in parameters)
        self.state = rest.state
        self.param_groups += rest.param_groups
        self.squared_updates: dict[Tensor, Tensor] | None = None
        """The squared norms of the last updates, fp64, by parameter, if this is not None when a step begins."""
        model, rank = parallel.model.config, self.axis.rank
        shardings = {name: Sharding(one.metadata.shape, isinstance(one.parameter, DTensor)) for name, one in named.items()}
        for name, (shape, by_fsdp) in shardings.items():
            assert named[name].metadata == shard_of(name, shape, model, parallel.mesh.sizes, by_fsdp, rank), name
        self.products = config.muon.products
        sizes = {name: one.metadata.sizes for name, one in named.items()}
        found = buckets(Layout(model, config.muon, parallel.mesh.sizes, rank), shardings)
        self.buckets = [(bucket, bucket.stacked(sizes)) for bucket in found]
        """Each with whether its parameters are stacks of whole matrices."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates all parameters by their gradients."""
        assert closure is None
        directions: dict[str, Tensor] = {}
        for bucket, stacked in self.buckets:
            for name in bucket.names:
                directions[name] = self._direction(self.named[name])
            if stacked:
                self._orthogonalize_here(bucket, directions)
            else:
                self._orthogonalize(bucket, directions)
            for name in bucket.ended:
                self._move(self.named[name].parameter, directions.pop(name))
        self.rest.step()

    def _direction(self, sharded: ShardedParameter) -> Tensor:
        """Adds the gradient to the momentum. Returns where Nesterov's momentum points, in the dtype of the products."""
        gradient, momentum = gradient_of(sharded), local(self.state[sharded.parameter]["exp_avg"])
        decay = self.param_groups[0]["momentum"]
        momentum.lerp_(gradient, 1 - decay)
        return gradient.lerp(momentum, decay).to(product_dtype(gradient, self.products))

    def _orthogonalize_here(self, bucket: Bucket, directions: dict[str, Tensor]) -> None:
        """Does what `_orthogonalize` does, for parameters that are stacks of matrices: those of a shape are copied as a whole."""
        by_shape: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name in bucket.names:
            rows, columns = self.named[name].metadata.sizes[-2:]
            by_shape[rows, columns].append(name)
        for shape, names in by_shape.items():
            stacks = [directions[name].view(-1, *shape) for name in names]
            updates_NAB = orthogonalize(torch.cat(stacks), update_scale(shape)).split([len(stack) for stack in stacks])
            for name, update_NAB in zip(names, updates_NAB, strict=True):
                directions[name] = update_NAB.view_as(directions[name])

    def _orthogonalize(self, bucket: Bucket, directions: Mapping[str, Tensor]) -> None:
        """Replaces the directions of the bucket's matrices by their updates, without the learning rate."""
        like = next(iter(directions.values()))
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, shape in enumerate(bucket.shapes):
            by_shape[shape].append(number)
        wholes: list[Tensor] = [like] * len(bucket.shapes)
        stacks = {shape: like.new_empty(len(numbers), *shape) for shape, numbers in by_shape.items()}

        def use(shape: tuple[int, int], stack: Tensor) -> None:
            for number, matrix in zip(by_shape[shape], stack.unbind(), strict=True):
                wholes[number] = matrix

        def here(one: Local) -> Tensor:
            return _cut(directions[one.name], one.place, self.named[one.name].metadata.offsets)

        def owned(one: Owned) -> Tensor:
            return _cut(wholes[one.number], one.place)

        for shape, stack in stacks.items():
            use(shape, stack)
        _copy([owned(whole) for _, whole in bucket.stays], [here(mine) for mine, _ in bucket.stays])
        if bucket.travels:
            exchange(_all(bucket.sent, here), _all(bucket.received, owned), like, self.axis)
        for shape, stack in stacks.items():
            use(shape, orthogonalize(stack, update_scale(shape)))
        _copy([here(mine) for mine, _ in bucket.stays], [owned(whole) for _, whole in bucket.stays])
        if bucket.travels:
            exchange(_all(bucket.returned, owned), _all(bucket.taken, here), like, self.axis)

    def _move(self, parameter: Tensor, update: Tensor) -> None:
        weight, lr, decay = local(parameter.data), self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        if self.squared_updates is not None:
            whole = update.to(weight.dtype).add(weight, alpha=decay)
            self.squared_updates[parameter] = torch.linalg.vector_norm(whole).double().mul(lr).square()
        weight.mul_(1 - lr * decay).sub_(update, alpha=lr)


def product_dtype(x: Tensor, products: MuonProducts) -> torch.dtype:
    """Returns the dtype in which matrices of the dtype of `x` are orthogonalised: `products`, but of fp64 fp64."""
    narrow = products is MuonProducts.bf16 or (products is MuonProducts.auto and kind_of(x) == "cuda")
    return torch.bfloat16 if narrow and x.dtype != torch.float64 else torch.promote_types(x.dtype, torch.float32)


def ranks_of_stage(mesh: Mesh) -> Axis:
    """Returns the ranks of this stage; of a pipeline by messages in the group of all, which has nothing else to do in an update."""
    stage = members(mesh.rank, digits(DENSE[1:], mesh.sizes))
    if 1 < len(stage) < mesh.world:
        mesh.by_messages.add(stage)
    return mesh.axis(*DENSE[1:])


def exchange(sent: Mapping[int, list[Tensor]], received: Mapping[int, list[Tensor]], like: Tensor, axis: Axis) -> None:
    """Sends tensors to ranks of the axis, and writes what comes into those of `received`, of the same sizes: one all-to-all."""
    send, receive = ([sum(x.numel() for x in of.get(rank, ())) for rank in range(axis.size)] for of in (sent, received))
    out, into = like.new_empty(sum(send)), like.new_empty(sum(receive))
    _copy(_views(out, sent), _in_order(sent))
    with collective("all_to_all", axis, send, receive):
        if axis.ranks:
            for work in start_swap(out.split(send), into.split(receive), axis):
                work.wait()
        else:
            dist.all_to_all_single(into, out, receive, send, group=axis.group)
    _copy(_in_order(received), _views(into, received))


def _views(flat: Tensor, of: Mapping[int, list[Tensor]]) -> list[Tensor]:
    tensors = _in_order(of)
    return [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors, strict=True)]


def _in_order(of: Mapping[int, list[Tensor]]) -> list[Tensor]:
    return [x for rank in sorted(of) for x in of[rank]]


def _copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    if to:
        _foreach_copy_(list(to), list(source))


def _all(of: Mapping[int, Sequence[Any]], view: Callable[[Any], Tensor]) -> dict[int, list[Tensor]]:
    return {rank: [view(one) for one in ones] for rank, ones in of.items()}


def _cut(x: Tensor, place: Rectangle, offsets: Sequence[int] = ()) -> Tensor:
    """Returns a rectangle, as a view; `offsets`: of the tensor in the coordinates of `place`."""
    offsets = offsets or (0,) * x.ndim
    for index, offset in zip(place.leading, offsets, strict=False):
        x = x[index - offset]
    return x.narrow(0, place.row - offsets[-2], place.rows).narrow(1, place.column - offsets[-1], place.columns)
