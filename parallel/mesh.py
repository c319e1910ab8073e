"""The ranks as two meshes over the same world: one for dense parameters, one for experts (parallel folding).

    dense    replicate x shard x tensor                                     neighbours are tensor-parallel
    experts  expert_replicate x expert_shard x expert x expert_tensor       neighbours share experts, then are expert-parallel

Expert parallelism takes no ranks of its own: an expert group is a run of neighbouring ranks across tensor and data ranks.
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


class Axis(NamedTuple):
    """A group of ranks that this rank is one of. A group of one has no process group and never communicates."""

    size: int
    rank: int
    group: dist.ProcessGroup | None


@dataclass
class Mesh:
    """Both meshes, seen from one rank. Groups are made at first use, which must come in the same order on every rank."""

    world: int
    rank: int
    sizes: dict[str, int]
    axes: dict[tuple[str, ...], Axis] = field(default_factory=dict)

    def axis(self, *names: str) -> Axis:
        """The ranks that differ from this one in the named dimensions (of one of the meshes) alone."""
        if names not in self.axes:
            self.axes[names] = self._make(names)
        return self.axes[names]

    @property
    def everyone(self) -> Axis:
        return self.axis(*DENSE)

    @property
    def data(self) -> Axis:
        """Ranks with different rows of the batch."""
        return self.axis("replicate", "shard")

    @property
    def tensor(self) -> Axis:
        """Ranks with the same rows and different slices of them and of the dense weights."""
        return self.axis("tensor")

    def device_mesh(self, name: str, device: torch.device) -> DeviceMesh:
        """One dimension as torch's own mesh, for FSDP2."""
        group = self.axis(name).group
        assert group is not None
        return DeviceMesh.from_group(group, device.type, mesh_dim_names=(name,))

    def _make(self, names: tuple[str, ...]) -> Axis:
        dims = DENSE if names[0] in DENSE else EXPERTS
        firsts = self._ranks(dims, [dim for dim in dims if dim not in names])
        return self.axis_of([[first + further for further in self._ranks(dims, names)] for first in firsts])

    def _ranks(self, dims: Sequence[str], varied: Sequence[str]) -> list[int]:
        """The ranks at 0 in all of `dims` but the `varied` ones, the last of these fastest."""
        places = itertools.product(*(range(self.sizes[dim]) for dim in varied))
        strides = [math.prod(self.sizes[dim] for dim in dims[dims.index(dim) + 1 :]) for dim in varied]
        return [sum(map(operator.mul, place, strides)) for place in places]

    def axis_of(self, groups: list[list[int]]) -> Axis:
        """The one of `groups` (which share out the world, in the same order on every rank) that this rank is in."""
        mine = next(group for group in groups if self.rank in group)
        if len(mine) == 1:
            return Axis(1, 0, None)
        process_group: Any = dist.group.WORLD if len(groups) == 1 else dist.new_subgroups_by_enumeration(groups)[0]
        return Axis(len(mine), mine.index(self.rank), process_group)


def build_mesh(config: ParallelConfig) -> Mesh:
    """The meshes of the current world (train/config/validate.py has refused what does not divide)."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return Mesh(world, rank, mesh_sizes(config, world))
