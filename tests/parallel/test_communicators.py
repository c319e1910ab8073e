"""The groups that a layout needs: few, what the mesh creates, and on real ranks each sums what it should."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tokenyard.parallel import mesh as mesh_module
from tokenyard.parallel.collectives import all_reduce, max_over, stack_over, sum_over
from tokenyard.parallel.communicators import axes_used, communicator_table, communicators, links
from tokenyard.parallel.config import Exchange, ParallelConfig, PipelineSchedule
from tokenyard.parallel.dispatch.deduplicated import node_axes
from tokenyard.parallel.layout import DENSE, EXPERTS, mesh_sizes, node_digits
from tokenyard.parallel.mesh import Axis, Mesh, build_mesh
from tokenyard.parallel.pipeline.p2p import Links, disjoint
from tokenyard.parallel.pipeline.schedule import stage_hops
from tokenyard.parallel.pipeline.stages import copies_embedding
from tokenyard.train.config.compose import compose

EXPERIMENTS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml"))


def divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def layouts(world: int) -> Iterator[ParallelConfig]:
    """Every combination of degrees that fits."""
    for pipeline in divisors(world):
        stage = world // pipeline
        for tensor, context, shard in itertools.product(divisors(stage), repeat=3):
            if (shard > 1 and shard % context) or stage % (tensor * math.lcm(context, shard)):
                continue
            for expert in divisors(stage):
                for expert_tensor in divisors(stage // expert):
                    degrees = {"tensor": tensor, "context": context, "shard": shard}
                    yield ParallelConfig(**degrees, expert=expert, expert_tensor=expert_tensor, pipeline=pipeline)


@pytest.mark.parametrize(("world", "most", "above_six"), [(8, 6, 0), (16, 7, 0.04), (64, 9, 0.25)])
def test_few_groups_on_every_layout(world: int, most: int, above_six: float) -> None:
    """More than six only if seven axes differ that each send weights, gradients or activations of their own."""
    model, counts = compose(["model=tiny_deepseek_v3"]).model, Counter[int]()
    for parallel in layouts(world):
        found = communicators(model, parallel, world, 8)
        counts[len(found)] += 1
        assert len({each.ranks for each in found}) == len(found)
        assert all(any(not use.sums for use in each.uses) for each in found), f"{parallel}: a group for sums alone"
    assert max(counts) == most
    assert sum(counts[count] for count in range(7, most + 1)) <= above_six * counts.total()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_few_groups_in_each_experiment(experiment: str) -> None:
    config = compose([f"experiment={experiment}"])
    world = config.launch.nodes * config.launch.ranks
    assert len(communicators(config.model, config.parallel, world, config.launch.ranks)) <= 6
    assert links(config.parallel) <= 4


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
        for use in axes_used(config, parallel):
            (mesh.sums if use.sums else mesh.axis)(*use.names)
        wanted = {each.ranks for each in communicators(config, parallel, 64, 8, rank)}
        if parallel.pipeline > 1 and copies_embedding(config, parallel):
            mesh.ends("replicate") if parallel.shard > 1 else mesh.ends(*DENSE[1:4])
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
        "A rank is in 5 groups, and h|as 2 links.|",
    ]


@pytest.mark.parametrize("kind", PipelineSchedule)
@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_links_of_a_lane_share_no_rank(kind: PipelineSchedule, ranks: int) -> None:
    hops = stage_hops(kind, ranks, ParallelConfig(pipeline=ranks, pipeline_schedule=kind).pipeline_stages)
    lanes = disjoint(hops)
    assert sorted(itertools.chain(*lanes)) == hops and len(lanes) <= 4
    assert all(len(set(itertools.chain(*lane))) == 2 * len(lane) for lane in lanes)


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
        for (_, sender, receiver), group in Links(mesh, parallel.pipeline_schedule, parallel.pipeline_stages).groups.items():
            both = [place * mesh.stage.size + mesh.stage.rank for place in sorted((sender, receiver))]
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


def test_a_sum_over_two_groups_has_the_same_bits_everywhere(ranks: Any) -> None:
    found = ranks(4, sum_over_two_groups)
    assert all(torch.equal(total, found[0][0]) and largest == 3 and order == [0, 1, 2, 3] for total, largest, order, _ in found)
    torch.testing.assert_close(found[0][0], sum(mine for _, _, _, mine in found))


def sum_over_two_groups() -> tuple[torch.Tensor, float, list[int], torch.Tensor]:
    mesh = build_mesh(ParallelConfig(tensor=2, context=2))
    mesh.axis("tensor"), mesh.axis("context")
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
