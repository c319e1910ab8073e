"""Copies of a save's shards in host memory, made by the save's thread during the next forward and backward pass.

Weights and moments change only in the optimizer's update, so only the update has to wait for the copies (lazy copies as in
DataStates-LLM, arXiv 2406.10707). With a limit smaller than the shards, they are copied and written in turns, and the update waits
for the last copy.
"""

import itertools
import math
from collections.abc import Iterator
from threading import Event as Flag
from time import perf_counter

import torch
from torch import Tensor

from ..parallel.shard import LocalShard, ShardMetadata
from ..parallel.streams import Event, SideStream, copy_to_host, enter_thread, host_buffer, record_event

CPU = torch.device("cpu")
ALIGNMENT = 64
"""Each copy begins at a multiple of these bytes."""
PARTS = 8
"""A tensor larger than this share of the limit is cut, so that a turn fills most of the buffer."""


class HostStaging:
    """One buffer of host memory (pinned, for a GPU), reused from save to save. Copies are made in the save's thread.

    limit: most bytes of the buffer in `copy_in_turns`; None: as many as all shards have.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._buffer: Tensor | None = None
        self._copied = Flag()
        self._copied.set()

    def begin(self) -> None:
        """Makes `wait` block, until the end of the copies."""
        self._copied.clear()

    def end(self) -> None:
        """Ends that: nothing is left to copy, or the copy is given up."""
        self._copied.set()

    def wait(self) -> float:
        """Blocks until the copied tensors may change. Returns the seconds it took."""
        begin = perf_counter()
        self._copied.wait()
        return perf_counter() - begin

    def fits(self, shards: dict[str, LocalShard]) -> bool:
        """Whether `copy` stays within the limit."""
        return self.limit is None or sum(_room(tensor) for _, tensor in shards.values()) <= self.limit

    def copy(self, shards: dict[str, LocalShard], ready: Event) -> dict[str, LocalShard]:
        """Copies of the shards on the host, with the values they have when `ready` is done.

        Raises RuntimeError if a tensor changed while it was copied. Empties `shards`: GPU tensors made for the save alone are then
        freed before the writing begins.
        """
        try:
            versions = _versions(shards)
            copies = self._copy_on_side_stream(list(shards.values()), ready)
            _check_unchanged(shards, versions)
            found = dict(zip(shards, copies, strict=True))
            shards.clear()
            return found
        finally:
            self.end()

    def copy_in_turns(self, shards: dict[str, LocalShard], ready: Event) -> Iterator[tuple[str, LocalShard]]:
        """Yields names and copies of rectangles of the shards, in their order: each shard's elements, row-major, without a gap.

        A copy is overwritten some time after the next one is asked for. Otherwise like `copy`.
        """
        assert self.limit is not None
        try:
            versions, turns = _versions(shards), _turns(shards, self.limit)
            turn = next(turns, [])
            while turn:
                copies = self._copy_on_side_stream([part for _, part in turn], ready)
                names = [name for name, _ in turn]
                turn = next(turns, [])
                if not turn:
                    _check_unchanged(shards, versions)
                    shards.clear()
                    self.end()
                yield from zip(names, copies, strict=True)
        finally:
            self.end()

    def _copy_on_side_stream(self, shards: list[LocalShard], ready: Event) -> list[LocalShard]:
        """Copies on a stream of their own and waits, on the host, for the last one."""
        device = next((tensor.device for _, tensor in shards if tensor.is_cuda), CPU)
        enter_thread(device)
        ends = list(itertools.accumulate(_room(tensor) for _, tensor in shards))
        if self._buffer is None or len(self._buffer) < (ends[-1] if ends else 0):
            self._buffer = None  # freed before the next is allocated
            self._buffer = host_buffer(ends[-1] if ends else 0, device)
        used = [tensor for _, tensor in shards if tensor.device.type == device.type]
        with SideStream(device).behind(ready, *used):
            copies = [
                LocalShard(metadata, self._copy_tensor(tensor, begin))
                for (metadata, tensor), begin in zip(shards, [0, *ends], strict=False)
            ]
            last = record_event(device)
        last.wait()
        return copies

    def _copy_tensor(self, tensor: Tensor, begin: int) -> Tensor:
        assert self._buffer is not None
        memory = self._buffer[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return copy_to_host(tensor, memory)


def device_of(shards: dict[str, LocalShard]) -> torch.device:
    """Returns this rank's GPU if a tensor is on it, else the CPU."""
    return next((tensor.device for _, tensor in shards.values() if tensor.is_cuda), CPU)


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _versions(shards: dict[str, LocalShard]) -> dict[str, int]:
    return {name: tensor._version for name, (_, tensor) in shards.items()}


def _check_unchanged(shards: dict[str, LocalShard], versions: dict[str, int]) -> None:
    changed = [name for name, (_, tensor) in shards.items() if tensor._version != versions[name]]
    if changed:
        raise RuntimeError(f"tensor {changed[0]!r} changed while it was copied")


def _turns(shards: dict[str, LocalShard], limit: int) -> Iterator[list[tuple[str, LocalShard]]]:
    """Yields lists of consecutive parts of the shards which need at most `limit` bytes."""
    turn: list[tuple[str, LocalShard]] = []
    used = 0
    for name, shard in shards.items():
        for part in _parts(shard, max(1, limit // PARTS // shard.tensor.element_size())):
            size = _room(part.tensor)
            if turn and used + size > limit:
                yield turn
                turn, used = [], 0
            turn.append((name, part))
            used += size
    if turn:
        yield turn


def _parts(shard: LocalShard, most: int) -> Iterator[LocalShard]:
    """Cuts a shard into rectangles of at most `most` elements, each a run of its elements in row-major order."""
    (shape, offsets, sizes), tensor = shard
    if tensor.numel() <= most:
        yield shard
        return
    dim = next(dim for dim in range(len(sizes)) if math.prod(sizes[dim + 1 :]) <= most)
    step = most // math.prod(sizes[dim + 1 :])
    for place in itertools.product(*map(range, sizes[:dim]), range(0, sizes[dim], step)):
        count = min(step, sizes[dim] - place[dim])
        begins, extents = (*place, *[0] * len(sizes[dim + 1 :])), (*[1] * dim, count, *sizes[dim + 1 :])
        metadata = ShardMetadata(shape, tuple(map(sum, zip(offsets, begins, strict=True))), extents)
        yield LocalShard(metadata, ShardMetadata(sizes, begins, extents).cut(tensor.detach()))
