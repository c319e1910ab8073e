"""All ranks of a world, one after the other: those that meet in a group come to the same collectives in the same order."""

from collections.abc import Callable
from itertools import combinations, zip_longest
from typing import Any

import pytest
from dry import Found, ranks_of
from tokenyard.checkpoint.save_plan import HeldShards, make_save_plan
from tokenyard.plan.ledger import Collective

LAYOUTS = [
    "parallel.shard=2 parallel.expert=4 parallel.tensor=2 parallel.expert_tensor=2 model.moe.balance.scope=batch",
    "parallel.context=2 parallel.shard=4 parallel.expert=4 parallel.tensor=2 model.moe.capacity.factor=1 data.mask_documents=true",
    "parallel.pipeline=2 parallel.pipeline_schedule=interleaved parallel.expert=4 parallel.tensor=2 "
    "parallel.pipeline_overlap=true model.layers=4 model.tie_embeddings=true model.moe.balance.pool_layers=true",
    "parallel.shard=4 parallel.zero=1 parallel.expert=2 parallel.recompute=block model.moe.capacity.factor=1",
    "parallel.pipeline=2 parallel.pipeline_schedule=zbv parallel.shard=2 parallel.expert=4 parallel.tensor=2 "
    "model.layers=3 model.tie_embeddings=true model.dense_first=1 model.moe.shortcut=true",
]


Ranks = list[tuple[Found, set[str], HeldShards]]


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks_of_a_world(request: pytest.FixtureRequest, apart: Callable[..., Any]) -> Ranks:
    return apart(ranks_of, tuple(request.param.split()), 8)


def test_ranks_meet(ranks_of_a_world: Ranks) -> None:
    steps = [step for step, _, _ in ranks_of_a_world]
    assert len({tuple(step.groups) for step in steps}) == 1, "groups are made by all ranks, in the same order"
    assert missed([step.collectives for step in steps]) is None
    assert all(len(step.collectives) > 20 for step in steps)


def test_messages_arrive(ranks_of_a_world: Ranks) -> None:
    """In each group what a rank sends to another is what that receives from it, in the same order."""
    steps = [step for step, _, _ in ranks_of_a_world]
    sent, received = (sorted(m[:3] for step in steps for m in getattr(step, kind)) for kind in ("sent", "received"))
    assert sent == received
    for pair in set(sent):
        there = [[m for step in steps for m in getattr(step, kind) if m[:3] == pair] for kind in ("sent", "received")]
        assert there[0] == there[1]


def test_ranks_agree_on_a_save(ranks_of_a_world: Ranks) -> None:
    """Their pieces make up every tensor, and each is written once. Copies to the host wait for nothing."""
    told = [one for _, _, one in ranks_of_a_world]
    names, rectangles = [one.names for one in told], [one.rectangles for one in told]
    shares = [make_save_plan(names, rectangles, [(rank, rank) for rank in range(8)], rank) for rank in range(8)]
    assert all(share.names and mine >= set(share.names) for (_, mine, _), share in zip(ranks_of_a_world, shares, strict=True))
    assert not any(step.unlisted or step.strangers for step, _, _ in ranks_of_a_world)


def test_ranks_that_miss_each_other_are_found() -> None:
    everyone, pair = Collective("allreduce", (0, 1, 2), "torch.float32", 4), Collective("alltoall", (0, 1), "torch.int64", None)
    assert missed([[everyone, pair], [everyone, pair], [everyone]]) is None
    assert missed([[everyone, pair], [pair, everyone], [everyone]]) == (0, 1, everyone, pair)
    assert missed([[everyone, pair], [everyone], [everyone]]) == (0, 1, pair, None)
    assert missed([[everyone], [everyone], [everyone._replace(elements=5)]]) == (0, 2, everyone, everyone._replace(elements=5))


def missed(ranks: list[list[Collective]]) -> tuple[int, int, Collective | None, Collective | None] | None:
    """Two ranks, and the first collectives that they are both in and do not come to together; None if there are none.

    Each pair of ranks counts: what NCCL does in one group may wait for what it does in another.
    """
    for one, other in combinations(range(len(ranks)), 2):
        theirs = ([each for each in ranks[rank] if {one, other} <= set(each.ranks)] for rank in (one, other))
        for first, second in zip_longest(*theirs):
            if first != second:
                return one, other, first, second
    return None
