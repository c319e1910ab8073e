"""When each collective of a rank was begun, waited for and done: how much of a step is exchange, and how much waiting for others.

Ranks of one machine have one clock (CLOCK_MONOTONIC), so the stamps of several ranks can be laid side by side.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

import torch.distributed as dist

from ..parallel import collectives
from ..parallel.dispatch import async_collectives as flights

Stamp = list[float]
"""Begun, first waited for, done; in seconds. What was never waited for is done when it was begun."""

PLACES: list[tuple[Any, str]] = [
    *((dist, name) for name in ("all_reduce", "all_to_all_single", "all_gather_single", "reduce_scatter_single")),
    (collectives, "all_gather"),
    (collectives, "_reduce_scatter"),
    (flights, "all_gather"),
]
"""Where this code and FSDP2 call collectives that carry tensors of a step."""


class Split(NamedTuple):
    """Seconds of one rank; they add up to its step."""

    computing: float
    exchanging: float
    """Held up by collectives after the last rank had begun them."""
    waiting: float
    """Held up before that."""


@contextmanager
def stamped() -> Iterator[list[Stamp]]:
    """The stamps of all collectives that begin inside, in their order."""
    stamps: list[Stamp] = []
    under_way: dict[int, tuple[Stamp, Any]] = {}
    wait = dist.Work.wait

    def waited(work: Any, *arguments: Any) -> Any:
        begin = perf_counter()
        result = wait(work, *arguments)
        stamp, _ = under_way.pop(id(work), ([0.0] * 3, None))
        stamp[1:] = begin, perf_counter()
        return result

    def begun(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            stamp = [perf_counter()] * 3
            stamps.append(stamp)
            work = function(*arguments, **settings)
            if work is None:
                stamp[2] = perf_counter()
            else:
                under_way[id(work)] = stamp, work  # the work too: another one may get its id
            return work

        return call

    with ExitStack() as stack:
        for place, name in PLACES:
            if hasattr(place, name):
                stack.enter_context(patch.object(place, name, begun(getattr(place, name))))
        stack.enter_context(patch.object(dist.Work, "wait", waited))
        yield stamps


def split_times(seconds: list[float], stamps: list[list[Stamp]]) -> list[Split]:
    """By rank, from each one's seconds of the step and its stamps. All ranks must have begun the same collectives."""
    assert len({len(own) for own in stamps}) == 1, "the ranks began different collectives"
    last = [max(stamp[0] for stamp in everyones) for everyones in zip(*stamps, strict=True)]
    return [_split(total, own, last) for total, own in zip(seconds, stamps, strict=True)]


def _split(total: float, own: list[Stamp], last: list[float]) -> Split:
    held = sum(done - waited for _, waited, done in own)
    waiting = sum(min(max(arrival - waited, 0.0), done - waited) for (_, waited, done), arrival in zip(own, last, strict=True))
    return Split(total - held, held - waiting, waiting)
