"""Collectives that are started and waited for, differentiable in both halves: what is computed in between overlaps with them.

A gradient takes the opposite way. It is started where the rows landed and waited for where they departed, so what overlaps
forward overlaps backward as well. Every rank takes part in every flight, with no rows too.
N ranks of the axis, D width, T own rows.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..collectives import all_gather
from ..mesh import Axis
from ..progress import collective, waiting


class Route(ABC):
    """From where to where rows travel."""

    axis: Axis

    @abstractmethod
    def start(self, rows: Tensor) -> tuple[Tensor, Any]:
        """What will be filled, and the work to wait for."""

    @abstractmethod
    def unpack(self, filled: Tensor) -> Tensor:
        """The rows that landed."""

    @abstractmethod
    def opposite(self) -> "Route":
        """The way of the gradient."""


class RowExchange(Route):
    """Rows in the order of the ranks they go to (`send` says how many to each) to those that come, in the order of the ranks."""

    def __init__(self, send: list[int], receive: list[int], axis: Axis) -> None:
        self.send, self.receive, self.axis = send, receive, axis

    def start(self, rows: Tensor) -> tuple[Tensor, Any]:
        out = rows.new_empty(sum(self.receive), *rows.shape[1:])
        with collective("all_to_all", self.axis, self.send, self.receive):
            return out, dist.all_to_all_single(out, rows, self.receive, self.send, group=self.axis.group, async_op=True)

    def unpack(self, filled: Tensor) -> Tensor:
        return filled

    def opposite(self) -> Route:
        return RowExchange(self.receive, self.send, self.axis)


class Gather(Route):
    """Every rank's rows to every rank; `sizes` says how many each has."""

    def __init__(self, sizes: list[int], axis: Axis) -> None:
        self.sizes, self.axis = sizes, axis

    def start(self, rows: Tensor) -> tuple[Tensor, Any]:
        rows = F.pad(rows, (0, 0, 0, max(self.sizes) - len(rows)))
        out = rows.new_empty(self.axis.size * len(rows), *rows.shape[1:])
        with collective("all_gather", self.axis):
            return out, all_gather(out, rows, group=self.axis.group, async_op=True)

    def unpack(self, filled: Tensor) -> Tensor:
        if min(self.sizes) == max(self.sizes):
            return filled
        parts = filled.unflatten(0, (self.axis.size, -1))
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def opposite(self) -> Route:
        return Scatter(self.sizes, self.axis)


class Scatter(Route):
    """Every rank's part of a sum of all rows, to the sum of this rank's own rows.

    A reduce-scatter that adds up in fp32 or wider and in the order of the ranks, whatever the type of the rows: as an all-to-all
    it sends the same bytes.
    """

    def __init__(self, sizes: list[int], axis: Axis) -> None:
        self.sizes, self.axis = sizes, axis

    def start(self, rows: Tensor) -> tuple[Tensor, Any]:
        own = [self.sizes[self.axis.rank]] * self.axis.size
        return RowExchange(self.sizes, own, self.axis).start(rows)

    def unpack(self, filled: Tensor) -> Tensor:
        wide = torch.promote_types(filled.dtype, torch.float32)
        own = self.sizes[self.axis.rank]
        return filled.view(self.axis.size, own, *filled.shape[1:]).sum(0, dtype=wide).to(filled.dtype)

    def opposite(self) -> Route:
        return Gather(self.sizes, self.axis)


class _UnderWay:
    """The collective that runs now, with its input, which must live until it ends. First the rows', later the gradient's."""

    def __init__(self) -> None:
        self.current: Any = None

    def start(self, rows: Tensor, way: Route) -> None:
        rows = rows.contiguous()
        self.current = way, rows, *way.start(rows)

    def finish(self) -> Tensor:
        way, _, filled, work = self.current
        self.current = None
        with waiting(f"all_to_all of rows over {way.axis.size} ranks"):
            work.wait()
        return way.unpack(filled)


class Flight(NamedTuple):
    """Rows that departed. `ticket` ties both halves together in the graph; without other ranks it is the rows themselves."""

    ticket: Tensor
    under_way: _UnderWay | None = None
    way: Route | None = None


def depart(rows: Tensor, way: Route) -> Flight:
    """Start to send rows of shape (T, D)."""
    if way.axis.size == 1:
        return Flight(rows)
    under_way = _UnderWay()
    ticket: Any = _Depart.apply(rows, under_way, way)
    return Flight(ticket, under_way, way)


def land(flight: Flight) -> Tensor:
    """Wait for the rows that come to this rank."""
    if flight.under_way is None:
        return flight.ticket
    return _Land.apply(*flight)  # pyright: ignore[reportReturnType]


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, under_way: _UnderWay, way: Route) -> Tensor:
        ctx.under_way = under_way
        under_way.start(rows, way)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.under_way.finish(), None, None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, under_way: _UnderWay, way: Route) -> Tensor:
        ctx.under_way, ctx.way = under_way, way
        return under_way.finish()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.under_way.start(grads[0], ctx.way.opposite())
        return grads[0].new_empty(0), None, None
