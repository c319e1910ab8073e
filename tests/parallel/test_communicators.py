"""The groups that a layout needs: few, what the mesh creates, and on real ranks each sums what it should."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tokenyard.bench.scale.every_layout import layouts
from tokenyard.parallel import mesh as mesh_module
from tokenyard.parallel.apply import create_axes
from tokenyard.parallel.collectives import all_reduce, max_over, stack_over, sum_over
from tokenyard.parallel.communicators import MOST, axes_used, communicator_table, communicators, grouping
from tokenyard.parallel.config import Exchange, ParallelConfig, PipelineSchedule
from tokenyard.parallel.dispatch.deduplicated import node_axes
from tokenyard.parallel.layout import DENSE, EXPERTS, digits, members, mesh_sizes, node_digits
from tokenyard.parallel.mesh import Axis, Mesh, build_mesh
from tokenyard.parallel.pipeline.p2p import Links
from tokenyard.train.config.compose import compose

EXPERIMENTS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml"))

NODES: dict[str, Any] = {"exchange": Exchange.hierarchical}
DEEPEP: dict[str, Any] = {"exchange": Exchange.deepep}
INTERLEAVED: dict[str, Any] = {"pipeline_schedule": PipelineSchedule["interleaved"]}


@pytest.mark.parametrize(
    ("world", "one_in", "changes"),
    [(16, 1, {}), (16, 1, INTERLEAVED | NODES), (64, 5, {}), (64, 5, DEEPEP), (512, 200, NODES), (512, 200, DEEPEP)],
)
def test_few_groups_on_every_layout(world: int, one_in: int, changes: dict[str, Any]) -> None:
    """With the groups of links to other stages. `one_in`: how many of the layouts are tried."""
    model = compose(["model=tiny_deepseek_v3"]).model
    for parallel in itertools.islice(layouts(world), 0, None, one_in):
        parallel, rank = replace(parallel, **changes), world * 3 // 7
        found = communicators(model, parallel, world, 8, rank)
        assert len(found) + grouping(model, parallel, world, 8).links <= MOST, parallel
        assert len({each.ranks for each in found}) == len(found)
        assert all(any(not use.sums for use in each.uses) for each in found), f"{parallel}: a group for sums alone"


def test_context_gives_way_last() -> None:
    """Where experts have memory registered for a group, and all axes of a pass and the links differ; nowhere else."""
    model, counts = compose(["model=tiny_deepseek_v3"]).model, Counter[bool]()
    for parallel in layouts(64):
        parallel = replace(parallel, exchange=Exchange.symmetric)
        if min(parallel.pipeline, parallel.tensor, parallel.context, parallel.shard, parallel.expert, parallel.expert_tensor) > 1:
            found = grouping(model, parallel, 64, 8)
            assert len(communicators(model, parallel, 64, 8)) + found.links <= MOST, parallel
            counts[digits(("context",), mesh_sizes(parallel, 64)) in found.by_messages] += 1
    assert counts[True] == 34


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_few_groups_in_each_experiment(experiment: str) -> None:
    config = compose([f"experiment={experiment}"])
    world = config.launch.nodes * config.launch.ranks
    found = grouping(config.model, config.parallel, world, config.launch.ranks)
    assert len(communicators(config.model, config.parallel, world, config.launch.ranks)) + found.links <= MOST


@pytest.mark.parametrize("model", ["tiny_gpt_oss", "tiny_deepseek_v3", "dense"])
def test_the_mesh_creates_these_groups_and_no_others(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each rank of every 50th layout of 64 ranks sees it."""
    config, created = compose([f"model={model}"]).model, list[tuple[int, ...]]()

    def create(own: Sequence[int], groups: Any) -> tuple[int, ...]:
        assert tuple(own) in {tuple(group) for group in groups()}
        created.append(tuple(own))
        return created[-1]

    monkeypatch.setattr(mesh_module, "create_group", create)
    for index, parallel in enumerate(itertools.islice(layouts(64), 0, None, 50)):
        rank, created[:] = index * 13 % 64, []
        mesh = Mesh(64, rank, mesh_sizes(parallel, 64))
        create_axes(config, parallel, mesh, 8)
        wanted = {each.ranks for each in communicators(config, parallel, 64, 8, rank)}
        assert {each for each in created if len(each) > 1} | {tuple(range(64))} == wanted, parallel


def test_the_table() -> None:
    parallel = ParallelConfig(tensor=2, shard=2, expert=4, pipeline=2)
    lines = list(communicator_table(compose(["model=tiny_qwen3_moe"]).model, parallel, 16, 8))
    cells = [line[:28].strip() + "|" + line[28:40].strip() + "|" + line[50:68].strip() for line in lines]
    assert cells[1:] == [
        "all ranks|16|0-15",
        "tensor|2|0,1",
        "tensor|2|the same",
        "expert|4|0-3",
        "shard|2|0,2",
        "expert_shard|2|0,4",
        "replicate|2|the same",
        "replicate x shard x tensor|2 x 2 x 2|by 3 groups above",
        "replicate x shard x tensor|2 x 2 x 2|by 3 groups above",
        "a link between stages|2|0,8",
        "A rank is in 5 groups.||",
    ]


REAL = {
    "data and experts": ParallelConfig(expert=2),
    "tensor and shards": ParallelConfig(tensor=2, shard=2, expert=4),
    "context and experts' columns": ParallelConfig(context=2, shard=2, expert=2, expert_tensor=2),
    "four stages": ParallelConfig(pipeline=4),
    "two stages": ParallelConfig(pipeline=2, tensor=2),
    "nodes": ParallelConfig(expert=4, exchange=Exchange.hierarchical),
}


@pytest.mark.parametrize("name", REAL)
def test_each_group_sums_its_ranks(name: str, ranks: Any) -> None:
    """Every rank adds a number of its own, so the sum says who took part."""
    parallel = REAL[name]
    sizes, ends = mesh_sizes(parallel, 4), {"four stages": [[0, 3], [1], [2], [0, 3]], "two stages": [[0, 2], [1, 3]] * 2}
    for rank, found in enumerate(ranks(4, sums_of_axes, parallel)):
        for names, (total, gathered) in found.items():
            own = ends[name][rank] if names == ("ends",) else [other for other in range(4) if only_in(names, rank, other, sizes)]
            assert (total, gathered) == (sum(10**other for other in own), own), (rank, names)


def sums_of_axes(parallel: ParallelConfig) -> dict[tuple[str, ...], tuple[int, list[int]]]:
    mesh = build_mesh(parallel)
    uses = axes_used(compose(["model=tiny_deepseek_v3"]).model, parallel)
    axes = {use.names: (mesh.sums if use.sums else mesh.axis)(*use.names) for use in uses}
    if parallel.exchange is Exchange.hierarchical:
        nodes, inside = node_axes(mesh, 2)
        assert (nodes.size, inside.size) == (2, 2)
        between = stack_over(stack_over(torch.tensor(mesh.rank), inside), nodes)
        assert between.flatten().tolist() == [0, 1, 2, 3]
    if parallel.pipeline > 1:
        axes["ends",] = mesh.ends("replicate")
        links = Links(mesh, parallel, on_world=False)
        for neighbour, group in links.groups.items():
            both = [place * mesh.stage.size + mesh.stage.rank for place in sorted((links.place, neighbour))]
            assert dist.get_process_group_ranks(group) == both
            assert sum_over(torch.tensor(10**mesh.rank), Axis(2, both.index(mesh.rank), group)) == sum(10**rank for rank in both)
    return {
        names: (int(sum_over(torch.tensor(10**mesh.rank), axis)), stack_over(torch.tensor(mesh.rank), axis).tolist())
        for names, axis in axes.items()
    }


def only_in(names: tuple[str, ...], one: int, other: int, sizes: dict[str, int]) -> bool:
    """Whether two ranks differ in no other dimension of the grid that the names are of."""
    dims = DENSE if set(names) <= set(DENSE) else EXPERTS
    places = list(itertools.product(*(range(sizes[dim]) for dim in dims)))
    return all(mine == theirs or dim in names for dim, mine, theirs in zip(dims, places[one], places[other], strict=True))


@pytest.mark.parametrize("by_messages", [(), ("tensor",), ("context",), ("context", "tensor")])
def test_a_sum_over_two_groups_has_the_same_bits_everywhere(ranks: Any, by_messages: tuple[str, ...]) -> None:
    """Also where an axis has no group and sends messages in that of all."""
    found = ranks(4, sum_over_two_groups, by_messages)
    assert all(torch.equal(total, found[0][0]) and largest == 3 and order == [0, 1, 2, 3] for total, largest, order, _ in found)
    torch.testing.assert_close(found[0][0], sum(mine for _, _, _, mine in found))


def sum_over_two_groups(by_messages: tuple[str, ...]) -> tuple[torch.Tensor, float, list[int], torch.Tensor]:
    mesh = build_mesh(ParallelConfig(tensor=2, context=2))
    mesh.by_messages = {members(mesh.rank, digits((name,), mesh.sizes)) for name in by_messages}
    assert [bool(mesh.axis(name).ranks) for name in ("tensor", "context")] == [
        name in by_messages for name in ("tensor", "context")
    ]
    axis = mesh.sums("context", "tensor")
    assert [part.size for part in axis.parts] == [2, 2] and axis.group is None and not axis.alone
    mine = torch.randn(1000, generator=torch.Generator().manual_seed(mesh.rank))
    order = stack_over(torch.tensor(mesh.rank), axis).tolist()
    return all_reduce(mine.clone(), axis), max_over(torch.tensor(float(mesh.rank)), axis).item(), order, mine


@pytest.mark.parametrize(
    ("expert", "expert_tensor", "node", "dims"),
    [
        (8, 1, 4, [(2, 4), (4, 1)]),
        (8, 2, 8, [(2, 8), (4, 2)]),
        (4, 2, 2, [(4, 2)]),
        (4, 1, 8, [(4, 1)]),
        (6, 3, 12, [(3, 6), (2, 3)]),
    ],
)
def test_hops_of_the_hierarchical_exchange(expert: int, expert_tensor: int, node: int, dims: list[tuple[int, int]]) -> None:
    """(size, stride) between nodes and inside one: ranks that share the columns of experts are neighbours, and no hop."""
    assert node_digits({"expert": expert, "expert_tensor": expert_tensor}, node) == dims
