"""Traces the collectives of a rank: when each started, when the rank waited for it, when it ended, and the bytes it sent.

Ranks on one machine share a clock (CLOCK_MONOTONIC), so the times of several ranks are comparable.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from ..parallel import collectives
from ..parallel.dispatch import async_collectives

CollectiveTimes = list[float]
"""Start, begin of the wait, end, in seconds. A collective that nobody waited for ends when it starts."""

PLACES: list[tuple[Any, str]] = [
    *((dist, name) for name in ("all_reduce", "all_to_all_single", "all_gather_single", "reduce_scatter_single")),
    (collectives, "all_gather"),
    (collectives, "_reduce_scatter"),
    (async_collectives, "all_gather"),
]
"""The functions through which this code and FSDP2 start the collectives of a step."""


class Split(NamedTuple):
    """The seconds of one rank in a step, in three parts."""

    computing: float
    exchanging: float
    """Blocked by collectives that all ranks have started."""
    waiting: float
    """Blocked by collectives that another rank has not started yet."""


@contextmanager
def trace_collectives() -> Iterator[list[CollectiveTimes]]:
    """Yields a list to which each collective that starts inside the block adds its times."""
    traced: list[CollectiveTimes] = []
    running: dict[int, tuple[CollectiveTimes, Any]] = {}
    wait = dist.Work.wait

    def waited(work: Any, *arguments: Any) -> Any:
        begin = perf_counter()
        result = wait(work, *arguments)
        times, _ = running.pop(id(work), ([0.0] * 3, None))
        times[1:] = begin, perf_counter()
        return result

    def started(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            times = [perf_counter()] * 3
            traced.append(times)
            work = function(*arguments, **settings)
            if work is None:
                times[2] = perf_counter()
            else:
                running[id(work)] = times, work  # keeps the work alive, so that no other one gets its id
            return work

        return call

    with ExitStack() as stack:
        for place, name in PLACES:
            if hasattr(place, name):
                stack.enter_context(patch.object(place, name, started(getattr(place, name))))
        stack.enter_context(patch.object(dist.Work, "wait", waited))
        yield traced


def split_times(seconds: list[float], traces: list[list[CollectiveTimes]]) -> list[Split]:
    """Splits each rank's `seconds` of a step by the traces of all ranks, which must have started the same collectives."""
    assert len({len(own) for own in traces}) == 1, "the ranks started different collectives"
    last = [max(times[0] for times in everyones) for everyones in zip(*traces, strict=True)]
    return [_split(total, own, last) for total, own in zip(seconds, traces, strict=True)]


def _split(total: float, own: list[CollectiveTimes], last: list[float]) -> Split:
    """`last`: when the last rank started each collective."""
    blocked = sum(done - waited for _, waited, done in own)
    waiting = sum(min(max(arrival - waited, 0.0), done - waited) for (_, waited, done), arrival in zip(own, last, strict=True))
    return Split(total - blocked, blocked - waiting, waiting)


# The bytes that leave a rank, counted where torch.distributed calls the backend.


class Traffic(TorchDispatchMode):
    """While active, adds the bytes that this rank sends to rank n of the world to `sent[n]`.

    A gathered tensor counts once for each other rank, as the links of a ring carry it. Raises AssertionError for an unknown
    collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rank = dist.get_rank()
        self.sent = [0] * dist.get_world_size()

    def total(self) -> int:
        """Returns the bytes sent to other ranks."""
        return sum(self.sent) - self.sent[self.rank]

    def between_nodes(self, node_ranks: int) -> int:
        """Returns the bytes sent to ranks of other nodes; a node has `node_ranks` neighbouring ranks."""
        return sum(count for rank, count in enumerate(self.sent) if rank // node_ranks != self.rank // node_ranks)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        match name:
            case "alltoall_base_":
                _, sent, group, _, splits = args[:5]
                ranks = _ranks(group)
                rows = splits or [len(sent) // len(ranks)] * len(ranks)
                row_bytes = sent.element_size() * sent.shape[1:].numel()
                self._add(ranks, [count * row_bytes for count in rows])
            case "_allgather_base_":
                _, sent, group = args[:3]
                self._add(_ranks(group), [sent.numel() * sent.element_size()] * len(_ranks(group)))
            case _:
                raise AssertionError(f"the bytes of {name} are not counted")

    def _add(self, ranks: list[int], counts: list[int]) -> None:
        for rank, count in zip(ranks, counts, strict=True):
            self.sent[rank] += count


def _ranks(group: Any) -> list[int]:
    """Returns the world ranks of a group, in the order of the group."""
    return dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
