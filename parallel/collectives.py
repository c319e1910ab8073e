"""The differentiable collectives of tensor and context parallelism, and small reductions.

On an axis of one rank each is the identity.

B sequences, S tokens of each, N ranks of the axis.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..moe.recompute import keep
from .mesh import Axis
from .progress import collective

# torch 2.13 renamed both; the old names are deprecated there.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_sequence(x_BSD: Tensor, axis: Axis) -> Tensor:
    """Gathers each rank's slice of the sequences, (B, S / N, D), to (B, S, D). The gradient is reduce-scattered."""
    return x_BSD if axis.size == 1 else _GatherSequence.apply(x_BSD, axis)  # pyright: ignore[reportReturnType]


def scatter_sequence(x_BSD: Tensor, axis: Axis) -> Tensor:
    """Sums (B, S, D) over the ranks and returns this rank's slice (B, S / N, D) of the sum. The gradient is gathered."""
    return x_BSD if axis.size == 1 else _ScatterSequence.apply(x_BSD, axis)  # pyright: ignore[reportReturnType]


def swap_parts(x_N: Tensor, axis: Axis) -> Tensor:
    """Sends x_N[n] to rank n; part n of the result comes from rank n. The gradient makes the same exchange."""
    return x_N if axis.size == 1 else _SwapParts.apply(x_N, axis)  # pyright: ignore[reportReturnType]


def all_reduce_parts(x: Tensor, axis: Axis) -> Tensor:
    """Sums `x` over the ranks. Each rank uses the sum for its own part of the loss, so the gradient is summed too."""
    return x if axis.size == 1 else _AllReduceParts.apply(x, axis)  # pyright: ignore[reportReturnType]


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """Sums `x` over the ranks, in place; not differentiable."""
    return x if axis.alone else keep(partial(all_reduce, x, axis, dist.ReduceOp.SUM))


def max_over(x: Tensor, axis: Axis) -> Tensor:
    """Takes the maximum of `x` over the ranks, in place; not differentiable."""
    return x if axis.alone else keep(partial(all_reduce, x, axis, dist.ReduceOp.MAX))


def all_reduce(x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduces `x` over the ranks, in place, with the same bits on all of them.

    Over several groups: to the first rank of each inner group, over the outer ones between these ranks, and back from them. Sums of
    sums in both groups could differ in their last bits, since groups with the same numbers may add in different orders.
    """
    if axis.ranks:
        return _reduce_by_messages(x, axis, op)
    *outer, inner = axis.parts or (axis,)
    if not outer:
        with collective("all_reduce", inner):
            dist.all_reduce(x, op=op, group=inner.group)
        return x
    if inner.ranks:
        _reduce_by_messages(x, inner, op)
    else:
        with collective("reduce", inner):
            dist.reduce(x, op=op, group=inner.group, group_dst=0)
    if inner.rank == 0:
        all_reduce(x, outer[0] if len(outer) == 1 else axis._replace(parts=tuple(outer)), op)
    with collective("broadcast", inner):
        if inner.ranks:
            first, *others = inner.ranks
            messages = ([], [(first, x)]) if inner.rank else ([(rank, x) for rank in others], [])
            for work in start_messages(*messages, inner.group):
                work.wait()
        else:
            dist.broadcast(x, group=inner.group, group_src=0)
    return x


def _reduce_by_messages(x: Tensor, axis: Axis, op: Any) -> Tensor:
    """Each rank reduces one part and sends it to the others: as many bytes as a ring, and the same bits on all ranks."""
    parts_NM = F.pad(x.flatten(), (0, -x.numel() % axis.size)).view(axis.size, -1)
    with collective("all_reduce", axis):
        found_NM = swap_by_messages(list(parts_NM), axis)
        part_M = found_NM.amax(0) if op == dist.ReduceOp.MAX else found_NM.sum(0, dtype=x.dtype)
        whole_NM = swap_by_messages([part_M] * axis.size, axis)
    return x.copy_(whole_NM.flatten()[: x.numel()].view_as(x))


def swap_by_messages(parts: list[Tensor], axis: Axis) -> Tensor:
    """Sends a part to each rank of an axis whose messages go through a larger group. Returns (N, ...), what each rank sent here."""
    out_N = parts[0].new_empty(len(parts), *parts[0].shape)
    for work in start_swap(parts, list(out_N), axis):
        work.wait()
    return out_N


def start_swap(parts: Sequence[Tensor], into: Sequence[Tensor], axis: Axis) -> list[Any]:
    """Starts to send a part to each rank of such an axis, and to receive from each; what stays here is copied."""
    into[axis.rank].copy_(parts[axis.rank])
    others = [(index, rank) for index, rank in enumerate(axis.ranks) if index != axis.rank]
    send, receive = ([(rank, side[index]) for index, rank in others if side[index].numel()] for side in (parts, into))
    return start_messages(send, receive, axis.group)


def start_messages(send: list[tuple[int, Tensor]], receive: list[tuple[int, Tensor]], group: Any) -> list[Any]:
    """Starts messages to and from ranks, numbered as in the world, in a group that may have more of them. Returns what to wait for.

    With NCCL they are one operation of the group's communicator: messages outside of a batch are too if the communicator was
    made with its device, as ours are, and else each pair of ranks would get a communicator of its own (torch 2.13).
    """
    each = [dist.P2POp(dist.isend, tensor, rank, group) for rank, tensor in send]
    each += [dist.P2POp(dist.irecv, tensor, rank, group) for rank, tensor in receive]
    return dist.batch_isend_irecv(each) if each else []


def stack_over(x: Tensor, axis: Axis) -> Tensor:
    """Stacks the `x` of all ranks to (N, ...); not differentiable."""
    return x.unsqueeze(0) if axis.alone else keep(partial(_all_gather, x, axis))


def _all_gather(x: Tensor, axis: Axis) -> Tensor:
    out = x
    for part in reversed(axis.parts or (axis,)):
        if part.ranks:
            with collective("all_gather", part):
                out = swap_by_messages([out.contiguous()] * part.size, part)
            continue
        mine, out = out, out.new_empty(part.size * out.numel())
        with collective("all_gather", part):
            all_gather(out, mine.contiguous().flatten(), group=part.group)
    return out.view(axis.size, *x.shape)


def _swap(x_N: Tensor, axis: Axis) -> Tensor:
    x_N = x_N.contiguous()
    out_N = torch.empty_like(x_N)
    with collective("all_to_all", axis):
        if axis.ranks:
            return swap_by_messages(list(x_N), axis)
        dist.all_to_all_single(out_N, x_N, group=axis.group)
    return out_N


def _gather(x_BSD: Tensor, axis: Axis) -> Tensor:
    return stack_over(x_BSD, axis).transpose(0, 1).flatten(1, 2)


def _scatter(x_BSD: Tensor, axis: Axis) -> Tensor:
    slices_NBSD = x_BSD.unflatten(1, (axis.size, -1)).transpose(0, 1).contiguous()
    out_BSD = torch.empty_like(slices_NBSD[0])
    with collective("reduce_scatter", axis):
        if axis.ranks:
            return swap_by_messages(list(slices_NBSD), axis).sum(0)
        _reduce_scatter(out_BSD.view(-1), slices_NBSD.view(-1), group=axis.group)
    return out_BSD


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _gather(x_BSD, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _scatter(grads[0], ctx.axis), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return keep(partial(_scatter, x_BSD, axis))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _gather(grads[0], ctx.axis), None


class _SwapParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_N: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return keep(partial(_swap, x_N, axis))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _swap(grads[0], ctx.axis), None


class _AllReduceParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return sum_over(x.clone(), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return sum_over(grads[0].clone(), ctx.axis), None
