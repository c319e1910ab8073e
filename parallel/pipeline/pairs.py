"""Which passes of a schedule run side by side: a forward pass and the backward pass after it. Without torch."""

from functools import cache

from ..config import PipelineSchedule
from .schedule import BACKWARD, FORWARD, Action, schedule

Unit = tuple[Action, ...]
"""One action, or two that run side by side. It begins when all that its actions need is there."""


@cache
def units(kind: PipelineSchedule, ranks: int, chunks: int, micros: int, overlap: bool) -> list[list[Unit]]:
    """Returns the schedule of each rank, with pairs if there is `overlap`."""
    lists = [schedule(kind, ranks, rank, chunks, micros, overlap) for rank in range(ranks)]
    return with_pairs(lists, ranks * chunks) if overlap else [[(action,) for action in actions] for actions in lists]


def with_pairs(lists: list[list[Action]], stages: int) -> list[list[Unit]]:
    """Returns the lists of all ranks as units, with as many pairs as the ranks can run without waiting for each other.

    Runs the lists against each other, as `timeline` does. If every rank waits, the first one that can begins with the forward pass
    of its pair alone, on which the backward pass depends. Raises ValueError if there is no such rank.
    """
    done, units = set[Action | None]([None]), [list[Unit]() for _ in lists]
    left = [list(reversed(actions)) for actions in lists]
    while any(left):
        moved, ready = False, list[int]()
        for rank, rest in enumerate(left):
            while rest:
                first, second = rest[-1], rest[-2] if len(rest) > 1 else None
                pair = second is not None and (first.kind, second.kind) == (FORWARD, BACKWARD) and first.micro != second.micro
                unit = tuple(rest[: -3 if pair else -2 : -1])
                there = [action.needs(stages) in done for action in unit]
                if not all(there):
                    ready += [rank] if there[0] else []
                    break
                _take(unit, rest, units[rank], done)
                moved = True
        if not moved and not ready:
            raise ValueError(f"ranks wait for each other: {', '.join(str(tuple(rest[-1])) for rest in left if rest)}")
        if not moved:
            rank = ready[0]
            _take((left[rank][-1],), left[rank], units[rank], done)
    return units


def _take(unit: Unit, rest: list[Action], units: list[Unit], done: set[Action | None]) -> None:
    del rest[-len(unit) :]
    units.append(unit)
    done.update(unit)
