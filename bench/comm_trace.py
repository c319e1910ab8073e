"""When each collective of a rank was begun, waited for and done: how much of a step is exchange, and how much waiting for others.

Ranks of one machine have one clock (CLOCK_MONOTONIC), so the stamps of several ranks can be laid side by side.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..parallel import collectives
from ..parallel.dispatch import async_collectives

Stamp = list[float]
"""Begun, first waited for, done; in seconds. What was never waited for is done when it was begun."""

PLACES: list[tuple[Any, str]] = [
    *((dist, name) for name in ("all_reduce", "all_to_all_single", "all_gather_single", "reduce_scatter_single")),
    (collectives, "all_gather"),
    (collectives, "_reduce_scatter"),
    (async_collectives, "all_gather"),
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


# The bytes that really leave a rank, counted where torch.distributed hands each collective to its backend.


class Traffic(TorchDispatchMode):
    """While it is entered, `sent[n]` grows by the bytes that this rank sends to rank n of the world.

    A gathered tensor is sent once to each other rank, as a ring's links carry it. AssertionError for a collective it does not know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rank = dist.get_rank()
        self.sent = [0] * dist.get_world_size()

    def total(self) -> int:
        """Bytes to other ranks."""
        return sum(self.sent) - self.sent[self.rank]

    def between_nodes(self, node_ranks: int) -> int:
        """Bytes to ranks of other nodes, which are runs of `node_ranks` ranks."""
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
                self._add(ranks, [count * _bytes_of_a_row(sent) for count in rows])
            case "_allgather_base_":
                _, sent, group = args[:3]
                self._add(_ranks(group), [sent.numel() * sent.element_size()] * len(_ranks(group)))
            case _:
                raise AssertionError(f"the bytes of {name} are not counted")

    def _add(self, ranks: list[int], counts: list[int]) -> None:
        for rank, count in zip(ranks, counts, strict=True):
            self.sent[rank] += count


def _ranks(group: Any) -> list[int]:
    """The world's ranks in the order of the group's."""
    return dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))


def _bytes_of_a_row(sent: Tensor) -> int:
    return sent.element_size() * sent.shape[1:].numel()
