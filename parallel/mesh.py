"""Two meshes over the same ranks, one for dense parameters and one for experts (parallel folding). The last dimension varies
fastest.

    dense    pipeline x replicate x shard x context x tensor
    experts  pipeline x expert_replicate x expert_shard x expert x expert_tensor

Expert parallelism needs no ranks of its own: an expert group is a run of neighbouring ranks across tensor and data ranks.
"""

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .config import ParallelConfig
from .layout import DENSE, EXPERTS, mesh_sizes

GROUPS = (
    DENSE,
    ("replicate", "shard", "context", "tensor"),
    ("replicate", "shard", "context"),
    ("replicate", "shard"),
    ("replicate", "tensor"),
    ("replicate",),
    ("shard", "context"),
    ("context", "tensor"),
    ("context",),
    ("tensor",),
    ("expert_replicate", "expert_shard", "expert_tensor"),
    ("expert_replicate", "expert_shard"),
    ("expert_replicate", "expert_tensor"),
    ("expert_replicate",),
    ("expert_shard",),
    ("expert",),
    ("expert_tensor",),
)
"""The groups that a layout may use, by dimensions."""


class Axis(NamedTuple):
    """A group of ranks that includes this one. A group of one has no process group and never communicates."""

    size: int
    rank: int
    group: dist.ProcessGroup | None


@dataclass
class Mesh:
    """Both meshes, as seen from one rank. Process groups are created at first use, in the same order on every rank."""

    world: int
    rank: int
    sizes: dict[str, int]
    axes: dict[tuple[str, ...], Axis] = field(default_factory=dict)

    def axis(self, *names: str) -> Axis:
        """Returns the ranks that differ from this one only in the named dimensions, which are of one mesh.

        A context of 1 is as if it were not named, so that it makes no group.
        """
        if names not in self.axes:
            self.axes[names] = self._make(names)
        return self.axes[names]

    @property
    def everyone(self) -> Axis:
        return self.axis(*DENSE)

    @property
    def stage(self) -> Axis:
        """The ranks with the same layers: all of them without pipeline parallelism."""
        return self.axis("replicate", "shard", "context", "tensor")

    @property
    def data(self) -> Axis:
        """The ranks with different rows of the batch."""
        return self.axis("replicate", "shard")

    @property
    def tensor(self) -> Axis:
        """The ranks with the same tokens, and different slices of them and of the dense weights."""
        return self.axis("tensor")

    @property
    def context(self) -> Axis:
        """The ranks with the same rows and different chunks of them, through all of the model (parallel/context.py)."""
        return self.axis("context")

    @property
    def sequence(self) -> Axis:
        """The ranks that together have the tokens of the same rows."""
        return self.axis("context", "tensor")

    def device_mesh(self, axis: Axis, name: str, device: torch.device) -> DeviceMesh:
        """Returns a group of ranks as a torch DeviceMesh, for FSDP2."""
        assert axis.group is not None
        return DeviceMesh.from_group(axis.group, device.type, mesh_dim_names=(name,))

    def _make(self, names: tuple[str, ...]) -> Axis:
        if "context" in names and self.sizes["context"] == 1:
            return self.axis(*(name for name in names if name != "context"))
        dims = EXPERTS if names and names[-1] in EXPERTS[1:] else DENSE
        firsts = self._ranks(dims, [dim for dim in dims if dim not in names])
        return self.axis_of([[first + further for further in self._ranks(dims, names)] for first in firsts])

    def _ranks(self, dims: Sequence[str], varied: Sequence[str]) -> list[int]:
        """Returns the ranks with coordinate 0 in all of `dims` but the `varied` ones, of which the last varies fastest."""
        coordinates = itertools.product(*(range(self.sizes[dim]) for dim in varied))
        strides = [math.prod(self.sizes[dim] for dim in dims[dims.index(dim) + 1 :]) for dim in varied]
        return [sum(map(operator.mul, coordinate, strides)) for coordinate in coordinates]

    def axis_of(self, groups: list[list[int]]) -> Axis:
        """Returns the group of this rank. `groups` partition the world and have the same order on every rank."""
        mine, several = next(group for group in groups if self.rank in group), [group for group in groups if len(group) > 1]
        if not several:
            return Axis(1, 0, None)
        process_group: Any = dist.group.WORLD if len(groups) == 1 else dist.new_subgroups_by_enumeration(several)[0]
        return Axis(len(mine), mine.index(self.rank), process_group if len(mine) > 1 else None)

    def ends(self, *names: str) -> Axis:
        """Returns the ranks of `axis(*names)` on the first stage and those on the last; on another stage this rank alone."""
        inner = self.world // self.sizes["pipeline"]
        last = self.world - inner
        firsts = self._ranks(DENSE, [dim for dim in DENSE[1:] if dim not in names])
        groups = [[first + further + end for end in (0, last) for further in self._ranks(DENSE, names)] for first in firsts]
        return self.axis_of([*groups, *([rank] for rank in range(inner, last))])

    def make_groups(self) -> None:
        """Creates every group that a stage may use, since stages with different kinds of layers do not come to the same ones."""
        for names in GROUPS:
            self.axis(*names)


def build_mesh(config: ParallelConfig) -> Mesh:
    """Builds the meshes of the current world. The configuration has been validated, so all degrees divide it."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return Mesh(world, rank, mesh_sizes(config, world))
