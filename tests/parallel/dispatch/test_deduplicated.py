"""The expert axis as nodes x ranks of a node."""

from typing import Any

import pytest
import torch.distributed as dist
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.dispatch.deduplicated import node_axes
from tokenyard.parallel.mesh import build_mesh

CASES = [
    (4, 2, [[[0, 2], [0, 1]], [[1, 3], [0, 1]], [[0, 2], [2, 3]], [[1, 3], [2, 3]]]),
    (4, 4, [[[0, 1, 2, 3]]] * 4),
    (4, 8, [[[0, 1, 2, 3]]] * 4),
    (4, 1, [[[0, 1, 2, 3]]] * 4),
    (2, 4, [[[0, 1]], [[0, 1]], [[2, 3]], [[2, 3]]]),
]


@pytest.mark.parametrize(("experts", "node_ranks", "expected"), CASES)
def test_axes(ranks: Any, experts: int, node_ranks: int, expected: list[list[list[int]]]) -> None:
    """First the ranks of the same index in other nodes, then the own node; one axis for one node, or nodes of one rank."""
    assert ranks(4, members, experts, node_ranks) == expected


def members(experts: int, node_ranks: int) -> list[list[int]]:
    axes = node_axes(build_mesh(ParallelConfig(expert=experts)), node_ranks)
    groups = [dist.get_process_group_ranks(axis.group) for axis in axes if axis.group is not None]
    assert all(group[axis.rank] == dist.get_rank() for group, axis in zip(groups, axes, strict=True))
    return groups
