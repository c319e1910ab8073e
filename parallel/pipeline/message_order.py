"""In which order the messages between stages travel, and which of them share a process group. Without torch.

A process group runs its messages in the order in which they were posted, and both ends post them in the same one. So all ranks run
the schedule in equal times, and post each message when its turn comes: no message then waits for one that depends on it.
"""

from functools import cache

from ..config import PipelineSchedule
from .pairs import units
from .schedule import BACKWARD, FORWARD, WEIGHTS, ZERO_BUBBLE, Action, stage_hops

Pair = tuple[int, int]
"""Two places in the pipeline, the lower one first."""


def lanes(kind: PipelineSchedule, ranks: int, stages: int) -> list[list[Pair]]:
    """Returns the places between which messages travel, in lists in each of which every place occurs once at most."""
    found: list[list[Pair]] = []
    for pair in sorted({(min(hop), max(hop)) for hop in stage_hops(kind, ranks, stages)}):
        fitting = next((lane for lane in found if not any(place in other for other in lane for place in pair)), None)
        if fitting is None:
            found.append(fitting := [])
        fitting.append(pair)
    return found


@cache
def message_order(kind: PipelineSchedule, ranks: int, chunks: int, micros: int, overlap: bool) -> list[Action]:
    """Returns the messages between all stages, each by the action that needs it, in the order in which what makes them ends.

    For a rank it is an order in which it can post them: what an action of its own needs comes before what the action makes.
    """
    stages, lists = ranks * chunks, units(kind, ranks, chunks, micros, overlap)
    times = {FORWARD: 1, BACKWARD: 1 if kind in ZERO_BUBBLE else 2, WEIGHTS: 1}
    ended: dict[Action | None, int] = {None: 0}
    free, done = [0] * ranks, [0] * ranks
    while any(done[rank] < len(lists[rank]) for rank in range(ranks)):
        before = sum(done)
        for rank, mine in enumerate(lists):
            while done[rank] < len(mine) and all(action.needs(stages) in ended for action in mine[done[rank]]):
                unit = mine[done[rank]]
                free[rank] = max(free[rank], *(ended[action.needs(stages)] for action in unit))
                for action in unit:
                    ended[action] = free[rank] = free[rank] + times[action.kind]
                done[rank] += 1
        assert sum(done) > before, "ranks wait for each other"
    messages = [action for action in ended if action is not None and needs_other_stage(action, stages)]
    return sorted(messages, key=lambda action: (ended[action.needs(stages)], action))


def needs_other_stage(action: Action, stages: int) -> bool:
    """Whether an action needs what another stage makes, which may be on the same rank."""
    needed = action.needs(stages)
    return needed is not None and needed.stage != action.stage
