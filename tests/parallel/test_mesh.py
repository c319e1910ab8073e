"""The groups of ranks by coordinates; this process simulates all ranks of a world."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tokenyard.parallel import mesh as mesh_module
from tokenyard.parallel.collectives import stack_over
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.layout import DENSE, EXPERTS
from tokenyard.parallel.mesh import build_mesh

LAYOUTS = [
    # world, tensor, shard, expert, expert_tensor, context (1), stages of a pipeline (1)
    (1, 1, 1, 1, 1),
    (2, 2, 1, 1, 1),
    (2, 1, 2, 2, 1),
    (2, 1, 2, 1, 2),
    (4, 2, 1, 2, 1),
    (4, 2, 2, 4, 1),
    (4, 1, 1, 2, 2),
    (8, 2, 2, 4, 1),
    (8, 1, 4, 4, 1),
    (8, 4, 2, 2, 1),
    (8, 2, 4, 2, 2),
    (8, 1, 2, 1, 4),
    (12, 2, 3, 4, 1),
    (12, 1, 4, 6, 1),
    (12, 3, 2, 2, 3),
    (16, 2, 4, 8, 1),
    (16, 4, 1, 16, 1),
    (16, 8, 1, 2, 4),
    (24, 2, 6, 2, 2),
    (4, 2, 1, 2, 1, 2),
    (8, 1, 4, 4, 1, 2),
    (16, 2, 4, 2, 2, 4),
    (12, 1, 6, 6, 1, 2),
    (8, 2, 2, 4, 1, 1, 2),
    (12, 1, 2, 2, 1, 1, 3),
    (4, 1, 1, 1, 1, 1, 4),
    (16, 2, 2, 4, 1, 2, 2),
]
AXES = [names for dims in (DENSE, EXPERTS) for n in range(1, len(dims) + 1) for names in itertools.combinations(dims, n)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_are_the_ranks_that_differ_in_the_named_coordinates_alone(
    layout: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, tensor, shard, expert, expert_tensor, context, pipeline = degrees(layout)
    holding, stage = expert * expert_tensor, world // pipeline
    expert_shard, data_shard, rows = math.gcd(shard, stage // holding), max(1, shard // context), tensor * context
    dense = {
        rank: (
            rank // stage,
            rank % stage // rows // data_shard,
            rank // rows % data_shard,
            rank // tensor % context,
            rank % tensor,
        )
        for rank in range(world)
    }
    experts = {
        rank: (
            rank // stage,
            rank % stage // holding // expert_shard,
            rank // holding % expert_shard,
            rank // expert_tensor % expert,
            rank % expert_tensor,
        )
        for rank in range(world)
    }
    for rank in range(world):
        mesh, made = mesh_of(rank, layout, monkeypatch)
        for names in AXES:
            dims, places = (DENSE, dense) if names[-1] in DENSE else (EXPERTS, experts)
            others = [dim for dim, name in enumerate(dims) if name not in names]
            expected = [r for r in range(world) if all(places[r][dim] == places[rank][dim] for dim in others)]
            axis = mesh.axis(*names)
            assert axis[:2] == mesh.place(*names)
            assert (axis.size, axis.rank) == (len(expected), expected.index(rank))
            assert axis.group == (None if len(expected) in (1, world) else expected), "WORLD is None in this process"
        for own, parting in made:
            assert own in parting and sorted(itertools.chain(*parting)) == list(range(world)), "all ranks create groups together"
        assert len({tuple(own) for own, _ in made}) == len(made), "equal groups are one"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_named_axes(layout: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    world, tensor, shard, expert, expert_tensor, context, pipeline = degrees(layout)
    stage = world // pipeline
    for rank in range(world):
        mesh, _ = mesh_of(rank, layout, monkeypatch)
        assert (mesh.stage.size, mesh.stage.rank) == (stage, rank % stage)
        assert (mesh.everyone.size, mesh.everyone.rank) == (world, rank)
        assert (mesh.tensor.size, mesh.tensor.rank) == (tensor, rank % tensor)
        assert (mesh.data.size, mesh.data.rank) == (stage // tensor // context, rank % stage // tensor // context)
        assert (mesh.context.size, mesh.context.rank) == (context, rank // tensor % context)
        assert (mesh.sequence.size, mesh.sequence.rank) == (context * tensor, rank % (context * tensor))
        assert mesh.axis("shard", "context").size == (shard if shard > 1 else context)
        assert (mesh.axis("expert_tensor").size, mesh.axis("expert_tensor").rank) == (expert_tensor, rank % expert_tensor)
        assert mesh.axis("expert").size == expert and mesh.axis("shard").size == max(1, shard // context)
        assert mesh.axis("shard") is mesh.axis("shard"), "made once"


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if len(layout) == 7], ids=str)
def test_the_ends_of_a_pipeline(layout: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ranks of the first stage and of the last one, without a group of their own; a rank of another stage is alone."""
    world, pipeline = layout[0], layout[6]
    stage = world // pipeline
    for rank in range(world):
        mesh, made = mesh_of(rank, layout, monkeypatch)
        groups = len(made)
        for names in (("replicate",), ("replicate", "shard", "context")):
            inside = [other for other in range(stage) if _same(other, rank % stage, names, layout)]
            expected = [*inside, *(world - stage + other for other in inside)] if rank // stage in (0, pipeline - 1) else [rank]
            axis = mesh.ends(*names)
            assert (axis.size, axis.rank) == (len(expected), expected.index(rank))
            assert list(axis.ranks or [rank]) == expected and len(made) == groups


def _same(one: int, other: int, names: tuple[str, ...], layout: tuple[int, ...]) -> bool:
    """Whether two ranks of a stage differ only in the named dimensions."""
    _, tensor, shard, _, _, context, _ = layout
    sharing = max(shard, context)  # the context ranks are among the shards
    fixed = [rank % tensor if "shard" in names else (rank % tensor, rank // tensor % sharing) for rank in (one, other)]
    return fixed[0] == fixed[1]


def test_experts_are_sharded_as_far_as_their_ranks_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {layout: mesh_of(0, layout, monkeypatch)[0].sizes["expert_shard"] for layout in LAYOUTS}
    assert sizes[8, 2, 2, 4, 1] == 2 and sizes[12, 1, 4, 6, 1] == 2 and sizes[4, 2, 2, 4, 1] == 1 and sizes[8, 1, 4, 4, 1] == 2
    assert sizes[8, 2, 4, 2, 2] == 2 and sizes[24, 2, 6, 2, 2] == 6


def test_a_context_of_one_makes_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, made = mesh_of(0, (8, 2, 2, 1, 1), monkeypatch)
    assert mesh.axis("shard", "context") is mesh.axis("shard") and mesh.axis("context", "tensor") is mesh.tensor
    assert mesh.context.group is None and len(made) == 2


def test_layouts_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for layout in ((4, 3, 1, 1, 1), (4, 2, 4, 1, 1), (4, 1, 1, 3, 1), (4, 1, 1, 4, 2)):
        with pytest.raises(AssertionError):
            mesh_of(0, layout, monkeypatch)


def test_groups_on_real_ranks_hold_those_ranks(ranks: Any) -> None:
    """Data groups are the columns of a 2 x 2 square, tensor and expert groups its rows."""
    columns, rows = [[0, 2], [1, 3], [0, 2], [1, 3]], [[0, 1], [0, 1], [2, 3], [2, 3]]
    found = ranks(4, members, ParallelConfig(tensor=2, expert=2))
    assert [groups["data"] for groups in found] == columns
    assert [groups["tensor"] for groups in found] == rows
    assert [groups["expert"] for groups in found] == rows
    assert [groups["everyone"] for groups in found] == [[0, 1, 2, 3]] * 4


def members(config: ParallelConfig) -> dict[str, list[int]]:
    mesh = build_mesh(config)
    axes = {
        "data": mesh.axis("replicate", "shard"),
        "tensor": mesh.tensor,
        "expert": mesh.axis("expert"),
        "everyone": mesh.everyone,
    }
    return {name: stack_over(torch.tensor(mesh.rank), axis).tolist() for name, axis in axes.items()}


def mesh_of(rank: int, layout: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """Returns the mesh of a rank, and a list to which the ranks of each group that it creates are appended, with those of all."""
    world, tensor, shard, expert, expert_tensor, context, pipeline = degrees(layout)
    made: list[Any] = []

    def create(own: Sequence[int], groups: Callable[[], list[Sequence[int]]]) -> list[int]:
        made.append((list(own), [list(group) for group in groups()]))
        return list(own)

    fakes = {"is_initialized": True, "get_world_size": world, "get_rank": rank}
    for name, value in fakes.items():
        monkeypatch.setattr(mesh_module.dist, name, lambda value=value: value)
    monkeypatch.setattr(mesh_module, "create_group", create)
    config = ParallelConfig(
        tensor=tensor, shard=shard, expert=expert, expert_tensor=expert_tensor, context=context, pipeline=pipeline
    )
    return build_mesh(config), made


def degrees(layout: tuple[int, ...]) -> tuple[int, ...]:
    return (*layout, 1, 1)[:7]
