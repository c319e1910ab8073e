"""Differentiable collectives in two halves, start and wait: what is computed in between overlaps with them.

The backward pass sends the gradient along the reverse route. It starts where the forward pass waited and waits where it started,
so what overlaps forward overlaps backward too. Every rank takes part in every collective, even without rows.
N ranks of the axis, D width, T own rows.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...moe.fp8 import pack_tokens, unpack_tokens
from ...moe.recompute import in_second_pass, keep, repeats
from ..collectives import all_gather, start_swap
from ..mesh import Axis
from ..pipeline.overlap import exchange_started, hand_over
from ..progress import collective, waiting


class Route(ABC):
    """A collective that moves rows between the ranks of an axis, and its reverse."""

    axis: Axis

    def start(self, rows: Tensor, ends_layer: bool = False, narrow: bool = False) -> "PendingRows":
        """Starts to send rows of shape (T, D). `ends_layer`: the layer keeps nothing of what arrives for its backward pass.

        Then a second pass, which ends at the last tensor that is kept, sends them where it waits for them, if it comes so far.
        `narrow`: the rows, of `round_tokens`, travel in e4m3; their gradient does not.
        """
        if self.axis.size == 1:
            return PendingRows(rows)
        running = _Running(self, ends_layer, (rows.shape[1], rows.dtype) if narrow else None)
        link: Any = _Start.apply(rows, running)
        return PendingRows(link, running)

    @abstractmethod
    def launch(self, rows: Tensor) -> tuple[Tensor, Any]:
        """Launches the collective. Returns its output buffer and the work to wait for."""

    def unpack(self, output: Tensor) -> Tensor:
        """Returns this rank's rows from the filled output buffer."""
        return output

    @abstractmethod
    def reverse(self) -> "Route":
        """Returns the route of the gradient."""


class AllToAll(Route):
    """Exchanges rows with uneven splits: `send` and `receive` are the numbers of rows for and from each rank, in rank order."""

    def __init__(self, send: list[int], receive: list[int], axis: Axis) -> None:
        self.send, self.receive, self.axis = send, receive, axis

    def launch(self, rows: Tensor) -> tuple[Tensor, Any]:
        out = rows.new_empty(sum(self.receive), *rows.shape[1:])
        with collective("all_to_all", self.axis, self.send, self.receive):
            if self.axis.ranks:
                return out, _All(start_swap(rows.split(self.send), out.split(self.receive), self.axis))
            return out, dist.all_to_all_single(out, rows, self.receive, self.send, group=self.axis.group, async_op=True)

    def reverse(self) -> Route:
        return AllToAll(self.receive, self.send, self.axis)


class AllGather(Route):
    """Every rank receives the rows of all ranks; `sizes` is the number of rows of each."""

    def __init__(self, sizes: list[int], axis: Axis) -> None:
        self.sizes, self.axis = sizes, axis

    def launch(self, rows: Tensor) -> tuple[Tensor, Any]:
        rows = F.pad(rows, (0, 0, 0, max(self.sizes) - len(rows)))
        out = rows.new_empty(self.axis.size * len(rows), *rows.shape[1:])
        with collective("all_gather", self.axis):
            if self.axis.ranks:
                return out, _All(start_swap([rows] * self.axis.size, list(out.view(self.axis.size, *rows.shape)), self.axis))
            return out, all_gather(out, rows, group=self.axis.group, async_op=True)

    def unpack(self, output: Tensor) -> Tensor:
        if min(self.sizes) == max(self.sizes):
            return output
        parts = output.unflatten(0, (self.axis.size, -1))
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def reverse(self) -> Route:
        return ReduceScatter(self.sizes, self.axis)


class ReduceScatter(Route):
    """Every rank receives the sum over ranks of its own rows; `sizes` is the number of rows of each.

    Sums in fp32 or wider and in rank order, whatever the dtype of the rows; the all-to-all inside sends as many bytes as a
    reduce-scatter.
    """

    def __init__(self, sizes: list[int], axis: Axis) -> None:
        self.sizes, self.axis = sizes, axis

    def launch(self, rows: Tensor) -> tuple[Tensor, Any]:
        own = [self.sizes[self.axis.rank]] * self.axis.size
        return AllToAll(self.sizes, own, self.axis).launch(rows)

    def unpack(self, output: Tensor) -> Tensor:
        wide = torch.promote_types(output.dtype, torch.float32)
        own = self.sizes[self.axis.rank]
        return output.view(self.axis.size, own, *output.shape[1:]).sum(0, dtype=wide).to(output.dtype)

    def reverse(self) -> Route:
        return AllGather(self.sizes, self.axis)


class _All(list[Any]):
    """Messages that are waited for together."""

    def wait(self) -> None:
        for work in self:
            work.wait()


class _Running:
    """The collective that is running, first of the rows, later of the gradient. Holds its input, which must live until it ends."""

    def __init__(self, route: Route, ends_layer: bool, narrow: tuple[int, torch.dtype] | None) -> None:
        """`narrow`: the width and dtype of rows that travel in e4m3."""
        self.route, self.ends_layer, self.narrow = route, ends_layer, narrow
        self.current: Any = None

    def start(self, rows: Tensor, route: Route, later: bool = False) -> None:
        """`later`: `wait` launches the collective."""
        rows = rows.contiguous()
        self.current = route, rows, None if later else route.launch(rows)
        if not later:
            exchange_started()

    def wait(self) -> Tensor:
        hand_over()
        route, rows, launched = self.current
        output, work = launched or route.launch(rows)
        self.current = None
        with waiting(f"all_to_all of rows over {route.axis.size} ranks"):
            work.wait()
        return route.unpack(output)


class PendingRows(NamedTuple):
    """Rows under way. `link` ties both halves together in the autograd graph; on an axis of one rank it is the rows."""

    link: Tensor
    running: _Running | None = None

    def wait(self) -> Tensor:
        """Waits for the rows of this rank and returns them."""
        if self.running is None:
            return self.link
        return _Wait.apply(self.link, self.running)  # pyright: ignore[reportReturnType]


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, running: _Running) -> Tensor:
        ctx.running = running
        if not repeats():
            sent = pack_tokens(rows) if running.narrow else rows
            running.start(sent, running.route, later=running.ends_layer and in_second_pass())
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.running.wait(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, running: _Running) -> Tensor:
        ctx.running = running
        came = keep(running.wait)
        return unpack_tokens(came, *running.narrow) if running.narrow else came

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.running.start(grads[0], ctx.running.route.reverse())
        return grads[0].new_empty(0), None
