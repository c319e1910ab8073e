"""What stands in for the package deep_ep: the documented interface of its Buffer, over gloo ranks and in any dtype.

What is sent with `async_finish` is there after `event.current_stream_wait()` and not before. Import it as `deep_ep_double`:
tests/conftest.py puts this folder on the path, of ranks too.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Sizes:
    """A configuration of kernels."""

    @staticmethod
    def get_nvl_buffer_size_hint(hidden_bytes: int, ranks: int) -> int:
        return 4 * hidden_bytes * ranks

    @staticmethod
    def get_rdma_buffer_size_hint(hidden_bytes: int, ranks: int) -> int:
        return 0


class Event:
    def __init__(self, arrive: Callable[[], None]) -> None:
        self.arrive = arrive

    def current_stream_wait(self) -> None:
        self.arrive()


class Handle(NamedTuple):
    goes_TN: Tensor
    came_N: list[int]
    """Tokens that came from each rank."""


class Buffer:
    made: ClassVar[list[int]] = []
    """The bytes of each that was made."""

    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        self.group, self.bytes = group, num_nvl_bytes
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        Buffer.made.append(num_nvl_bytes)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Sizes:
        return Sizes()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> Any:
        assert topk_idx.dtype == torch.int64
        rank_TK = topk_idx.div(num_experts // self.ranks, rounding_mode="floor")
        goes_TN = (rank_TK.unsqueeze(-1) == torch.arange(self.ranks)).any(1)
        counts_E = (topk_idx.unsqueeze(-1) == torch.arange(num_experts)).sum((0, 1), dtype=torch.int32)
        return goes_TN.sum(0, dtype=torch.int32), None, counts_E, goes_TN, None

    def dispatch(
        self,
        x: Tensor,
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        async_finish: bool = False,
    ) -> Any:
        self._check(x)
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            return torch.cat(self._exchange([x[goes_T] for goes_T in handle.goes_TN.T])), None, None, None, None, None
        assert num_tokens_per_rank is not None and is_token_in_rank is not None and num_tokens_per_expert is not None
        assert topk_idx is not None and topk_weights is not None
        assert torch.equal(num_tokens_per_rank, is_token_in_rank.sum(0, dtype=torch.int32))
        local = len(num_tokens_per_expert) // self.ranks
        parts = [[tensor[goes_T] for goes_T in is_token_in_rank.T] for tensor in (x, topk_idx, topk_weights)]
        came = [self._exchange(part) for part in parts]
        rows, experts, weights = (torch.cat(each) for each in came)
        experts = experts - self.rank * local
        mine = (experts >= 0) & (experts < local)
        counts = [int((experts == expert).sum()) for expert in range(local)]
        arrived = rows, experts.masked_fill(~mine, -1), weights * mine
        shown, event = later(arrived) if async_finish else (arrived, None)
        return *shown, counts, Handle(is_token_in_rank, [len(each) for each in came[0]]), event

    def combine(self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None, async_finish: bool = False) -> Any:
        self._check(x)
        arrived = tuple(self._sums(each, handle) for each in (x, topk_weights) if each is not None)
        shown, event = later(arrived) if async_finish else (arrived, None)
        return shown[0], shown[1] if len(shown) > 1 else None, event

    def _sums(self, rows: Tensor, handle: Handle) -> Tensor:
        came, sums = self._exchange(list(rows.split(handle.came_N))), rows.new_zeros(len(handle.goes_TN), rows.shape[1])
        for goes_T, part in zip(handle.goes_TN.T, came, strict=True):
            sums[goes_T] += part
        return sums

    def _exchange(self, parts: list[Tensor]) -> list[Tensor]:
        """Returns what each rank has for this one."""
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, parts, group=self.group)
        return [theirs[self.rank] for theirs in everyone]

    def _check(self, x: Tensor) -> None:
        assert x.is_contiguous() and 4 * x.shape[1] * x.element_size() * self.ranks <= self.bytes


def later(arrived: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Event]:
    """Returns tensors in whose place `arrived` is after the event."""
    shown = tuple(torch.full_like(each, float("nan") if each.is_floating_point() else -1) for each in arrived)

    def arrive() -> None:
        for place, value in zip(shown, arrived, strict=True):
            place.detach().copy_(value)  # kernels write behind the back of autograd

    return shown, Event(arrive)
