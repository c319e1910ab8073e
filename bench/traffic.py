"""The bytes that really leave a rank, counted where torch.distributed hands each collective to its backend."""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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
