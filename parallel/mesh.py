"""Two meshes over the same ranks, one for dense parameters and one for experts (parallel folding). The last dimension varies
fastest.

    dense    pipeline x replicate x shard x context x tensor
    experts  pipeline x expert_replicate x expert_shard x expert x expert_tensor

Expert parallelism needs no ranks of its own: an expert group is a run of neighbouring ranks across tensor and data ranks.

The groups of an axis part the world. All ranks create them together, each its own, so a rank creates as many groups as the layout
has axes, however many ranks there are. Axes with the same groups share them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .config import ParallelConfig
from .layout import DENSE, Digit, digits, ends, firsts, members, mesh_sizes, product_of


class Place(NamedTuple):
    """The place of this rank in a group of ranks, which need not have a process group."""

    size: int
    rank: int


class Axis(NamedTuple):
    """A group of ranks that includes this one. One of a single rank has no process group and never communicates.

    An axis of `parts` has none either: only `all_reduce` and `stack_over` of collectives.py know how to use the groups of those.
    They, and the exchanges of dispatch/async_collectives.py, also know an axis with `ranks`, whose group has further ranks.
    """

    size: int
    rank: int
    group: dist.ProcessGroup | None
    parts: tuple["Axis", ...] = ()
    """The axes whose product it is, the outermost first, if it has several ranks and no group."""
    ranks: tuple[int, ...] = ()
    """Its ranks, if they send messages to each other in `group`, that of all ranks; otherwise the group has these ranks alone."""

    @property
    def indirect(self) -> bool:
        """Whether the group of this axis alone does not exist."""
        return bool(self.parts or self.ranks)

    @property
    def alone(self) -> bool:
        return self.group is None and not self.parts


@dataclass
class Mesh:
    """Both meshes, as seen from one rank. A process group is created at first use, which all ranks come to in the same order:
    stages with different kinds of layers do so because `parallelize` asks for all that any of them uses.
    """

    world: int
    rank: int
    sizes: dict[str, int]
    axes: dict[tuple[str, ...], Axis] = field(default_factory=dict)
    """By the names of the dimensions."""
    by_ranks: dict[tuple[int, ...], Axis] = field(default_factory=dict)
    """By the ranks of the group, in ascending order."""
    products: dict[tuple[str, ...], Axis] = field(default_factory=dict)
    """The answers of `sums`."""
    by_messages: set[tuple[int, ...]] = field(default_factory=set)
    """The groups, by their ranks in ascending order, that are not created: their messages go through the group of all ranks."""

    def axis(self, *names: str) -> Axis:
        """Returns the ranks that differ from this one only in the named dimensions, which are of one mesh. Collective."""
        if names not in self.axes:
            self.axes[names] = self.strided(*digits(names, self.sizes))
        return self.axes[names]

    def place(self, *names: str) -> Place:
        """Returns the place of this rank in `axis(*names)`, without a process group."""
        size, rank = 1, 0
        for digit, stride in digits(names, self.sizes):
            size, rank = size * digit, rank * digit + self.rank // stride % digit
        return Place(size, rank)

    @property
    def everyone(self) -> Axis:
        return self.axis(*DENSE)

    @property
    def stage(self) -> Place:
        """The ranks with the same layers: all of them without pipeline parallelism."""
        return self.place(*DENSE[1:])

    @property
    def data(self) -> Place:
        """The ranks with different rows of the batch."""
        return self.place("replicate", "shard")

    @property
    def tensor(self) -> Axis:
        """The ranks with the same tokens, and different slices of them and of the dense weights."""
        return self.axis("tensor")

    @property
    def context(self) -> Axis:
        """The ranks with the same rows and different chunks of them, through all of the model (parallel/context.py)."""
        return self.axis("context")

    @property
    def sequence(self) -> Place:
        """The ranks that together have the tokens of the same rows."""
        return self.place("context", "tensor")

    def device_mesh(self, axis: Axis, name: str, device: torch.device) -> DeviceMesh:
        """Returns a group of ranks as a torch DeviceMesh, for FSDP2."""
        assert axis.group is not None
        return DeviceMesh.from_group(axis.group, device.type, mesh_dim_names=(name,))

    def sums(self, *names: str) -> Axis:
        """Returns `axis(*names)` for sums and small gathers: by groups of parts of its dimensions, if they exist. Collective."""
        if names not in self.products:
            parts = product_of(self.rank, digits(names, self.sizes), self.by_ranks)
            if parts is None or len(parts) == 1:
                self.products[names] = self.axis(*names)
            else:
                self.products[names] = Axis(*self.place(*names), None, tuple(self.by_ranks[ranks] for ranks in parts))
        return self.products[names]

    def strided(self, *dims: Digit) -> Axis:
        """Returns the ranks that differ from this one only in the given dimensions. Collective."""
        own = members(self.rank, dims)
        if own not in self.by_ranks:
            group = None
            ranks = own if own in self.by_messages else ()
            if ranks or len(own) == self.world > 1:
                group = dist.group.WORLD
            elif len(own) > 1:
                group = self.group(*dims)
            self.by_ranks[own] = Axis(len(own), own.index(self.rank), group, ranks=ranks)
        return self.by_ranks[own]

    def group(self, *dims: Digit) -> Any:
        """Creates a process group of the ranks that differ from this one only in the given dimensions. Collective."""
        return create_group(members(self.rank, dims), lambda: [members(first, dims) for first in firsts(range(self.world), dims)])

    def ends(self, *names: str) -> Axis:
        """Returns the ranks of `axis(*names)` on the first stage and those on the last; on another stage this rank alone."""
        own = ends(self.rank, digits(names, self.sizes), self.sizes["pipeline"], self.world)
        if len(own) == 1:
            return Axis(1, 0, None)
        return self.by_ranks.get(own) or Axis(len(own), own.index(self.rank), dist.group.WORLD, ranks=own)


def create_group(own: Sequence[int], groups: Callable[[], Iterable[Sequence[int]]]) -> Any:
    """Returns the process group of the ranks `own`. All ranks call it together, each with its own group, which may be itself alone.

    NCCL splits the communicator of all ranks: one collective of the world, for which `groups` returns the groups of all ranks.
    With gloo the members alone meet in the store, and connect to each other. Both name a group by its ranks and by how many groups
    the rank is in already, which is the same on all ranks because some come alone.
    """
    world: Any = dist.group.WORLD
    if world.bound_device_id is not None:
        return dist.split_group(world, [list(group) for group in groups()])
    return dist.new_group(list(own), use_local_synchronization=True)


def build_mesh(config: ParallelConfig) -> Mesh:
    """Builds the meshes of the current world. The configuration has been validated, so all degrees divide it."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return Mesh(world, rank, mesh_sizes(config, world))
