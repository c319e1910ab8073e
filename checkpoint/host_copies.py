"""Copies of a save's pieces in host memory, made by its thread beside the next forward and backward pass.

Weights and moments change in the optimizer's update alone, so only the update has to wait for them (DataStates-LLM's lazy copies,
arXiv 2406.10707).
"""

from threading import Event as Flag
from time import perf_counter

import torch

from ..parallel.shard import LocalShard
from ..parallel.streams import Event, SideStream, copy_to_host, enter_thread, host_memory, record, stream_waits

CPU = torch.device("cpu")


class Copies:
    """Memory that is kept from save to save (pinned, for a GPU). `take` runs in the thread, the rest in the training."""

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}
        self._done = Flag()
        self._done.set()

    def open(self) -> None:
        """From here on what is to be copied must not change."""
        self._done.clear()

    def close(self) -> None:
        """Nothing is to be copied, or no more."""
        self._done.set()

    def wait(self) -> float:
        """Until it may change; seconds."""
        begin = perf_counter()
        self._done.wait()
        return perf_counter() - begin

    def take(self, held: dict[str, LocalShard], ready: Event) -> dict[str, LocalShard]:
        """The same pieces, as they are when `ready` is done, on the host when this returns. RuntimeError if one has changed since.

        Empties `held`: a GPU's tensors that were made for the save alone are gone before the writing begins.
        """
        try:
            versions = {name: one.tensor._version for name, one in held.items()}
            copied = self._on_a_stream_of_its_own(held, ready)
            changed = [name for name, one in held.items() if one.tensor._version != versions[name]]
            if changed:
                raise RuntimeError(f"tensor {changed[0]!r} changed while it was copied")
            held.clear()
            return copied
        finally:
            self.close()

    def _on_a_stream_of_its_own(self, held: dict[str, LocalShard], ready: Event) -> dict[str, LocalShard]:
        """Beside the computation. The host waits for what lies behind the copies."""
        device = device_of(held)
        enter_thread(device)
        used = [tensor for _, tensor in held.values() if tensor.device.type == device.type]
        with SideStream(device).behind(ready, *used):
            copied = self._copied(held)
            last = record(device)
        last.wait()
        return copied

    def _copied(self, held: dict[str, LocalShard]) -> dict[str, LocalShard]:
        copied = {}
        for name, (piece, tensor) in held.items():
            memory = self._memory.get(name)
            if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
                memory = self._memory[name] = host_memory(tensor)
            copied[name] = LocalShard(piece, copy_to_host(tensor, memory))
        return copied


def in_place(held: dict[str, LocalShard], ready: Event) -> dict[str, LocalShard]:
    """In the thread: `held` without a copy, which the current stream of the device reads behind `ready`. Nothing changes it."""
    enter_thread(device_of(held))
    stream_waits(ready)
    return held


def device_of(held: dict[str, LocalShard]) -> torch.device:
    """The GPU of this rank, if a tensor is on it."""
    return next((tensor.device for _, tensor in held.values() if tensor.is_cuda), CPU)
