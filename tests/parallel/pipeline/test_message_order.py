"""The order of messages between stages: both ends can post it, and it loses little."""

from collections import deque

import pytest
from tokenyard.parallel.config import ParallelConfig, PipelineSchedule
from tokenyard.parallel.pipeline.message_order import lanes, message_order, needs_other_stage
from tokenyard.parallel.pipeline.pairs import units
from tokenyard.parallel.pipeline.schedule import Action, place_of, stage_hops

SEVERAL = (PipelineSchedule["interleaved"], PipelineSchedule["zbv"])
KINDS = [(kind, overlap) for kind in PipelineSchedule for overlap in (False, True) if not overlap or kind in SEVERAL]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("kind", "overlap"), KINDS)
@pytest.mark.parametrize(("ranks", "micros"), [(2, 4), (3, 9), (4, 4), (8, 24)])
def test_every_rank_comes_to_its_end(kind: PipelineSchedule, overlap: bool, ranks: int, micros: int, together: bool) -> None:
    """Also where posting a message blocks until the other end has posted it, which is the strictest that a backend can be."""
    chunks = 2 if kind in SEVERAL else 1
    stages, mine = ranks * chunks, [deque(unit) for unit in units(kind, ranks, chunks, micros, overlap)]
    apart = [[pair for lane in lanes(kind, ranks, stages) for pair in lane]] if together else lanes(kind, ranks, stages)
    waiting: dict[tuple[int, int], deque[Action]] = {}
    for message in message_order(kind, ranks, chunks, micros, overlap):
        for place in ends(kind, ranks, message):
            pair = tuple(sorted(ends(kind, ranks, message)))
            lane = next(index for index, lane in enumerate(apart) if pair in lane) if pair[0] != pair[1] else -1
            waiting.setdefault((place, lane), deque()).append(message)
    done, arrived = set[Action](), set[Action]()
    while any(mine) or any(waiting.values()):
        moved = False
        for rest in mine:
            while rest and all(ready(action, stages, done, arrived) for action in rest[0]):
                done.update(rest.popleft())
                moved = True
        for (_, lane), queue in waiting.items():
            while queue and queue[0].needs(stages) in done:
                both = ends(kind, ranks, queue[0])
                if any(waiting[end, lane][0] != queue[0] for end in both):
                    break
                message = queue[0]
                for end in {*both}:
                    for _ in range(1 + (lane < 0)):
                        waiting[end, lane].popleft()
                arrived.add(message)
                moved = True
        assert moved, "ranks wait for each other"


def ends(kind: PipelineSchedule, ranks: int, message: Action) -> tuple[int, int]:
    needed = message.needs(10**6)
    assert needed is not None
    return place_of(kind, ranks, needed.stage), place_of(kind, ranks, message.stage)


def ready(action: Action, stages: int, done: set[Action], arrived: set[Action]) -> bool:
    needed = action.needs(stages)
    return action in arrived if needs_other_stage(action, stages) else needed is None or needed in done


@pytest.mark.parametrize("kind", PipelineSchedule)
@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_pairs_of_a_lane_share_no_rank(kind: PipelineSchedule, ranks: int) -> None:
    stages = ParallelConfig(pipeline=ranks, pipeline_schedule=kind).pipeline_stages
    found = lanes(kind, ranks, stages)
    assert {pair for lane in found for pair in lane} == {(min(hop), max(hop)) for hop in stage_hops(kind, ranks, stages)}
    ring_of_odd = kind is PipelineSchedule["interleaved"] and ranks % 2
    assert len(found) <= (3 if ring_of_odd else 2)
    assert all(len({place for pair in lane for place in pair}) == 2 * len(lane) for lane in found)
