"""Copies of a save's shards in host memory, made by the save's thread during the next forward and backward pass.

Weights and moments change only in the optimizer's update, so only the update has to wait for the copies (lazy copies as in
DataStates-LLM, arXiv 2406.10707).
"""

from threading import Event as Flag
from time import perf_counter

import torch

from ..parallel.shard import LocalShard
from ..parallel.streams import Event, SideStream, copy_to_host, enter_thread, host_memory, record_event

CPU = torch.device("cpu")


class HostStaging:
    """Host memory (pinned, for a GPU), reused from save to save. `copy` runs in the save's thread, the rest in training's."""

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}
        self._copied = Flag()
        self._copied.set()

    def begin(self) -> None:
        """Makes `wait` block, until the end of `copy`."""
        self._copied.clear()

    def end(self) -> None:
        """Ends that: nothing is left to copy, or the copy is given up."""
        self._copied.set()

    def wait(self) -> float:
        """Blocks until the copied tensors may change. Returns the seconds it took."""
        begin = perf_counter()
        self._copied.wait()
        return perf_counter() - begin

    def copy(self, shards: dict[str, LocalShard], ready: Event) -> dict[str, LocalShard]:
        """Copies of the shards on the host, with the values they have when `ready` is done.

        Raises RuntimeError if a tensor changed while it was copied. Empties `shards`: GPU tensors made for the save alone are then
        freed before the writing begins.
        """
        try:
            versions = {name: tensor._version for name, (_, tensor) in shards.items()}
            copies = self._copy_on_side_stream(shards, ready)
            changed = [name for name, (_, tensor) in shards.items() if tensor._version != versions[name]]
            if changed:
                raise RuntimeError(f"tensor {changed[0]!r} changed while it was copied")
            shards.clear()
            return copies
        finally:
            self.end()

    def _copy_on_side_stream(self, shards: dict[str, LocalShard], ready: Event) -> dict[str, LocalShard]:
        """Copies on a stream of their own and waits, on the host, for the last one."""
        device = device_of(shards)
        enter_thread(device)
        used = [tensor for _, tensor in shards.values() if tensor.device.type == device.type]
        with SideStream(device).behind(ready, *used):
            copies = {name: LocalShard(metadata, self._copy_tensor(name, tensor)) for name, (metadata, tensor) in shards.items()}
            last = record_event(device)
        last.wait()
        return copies

    def _copy_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        memory = self._memory.get(name)
        if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
            memory = self._memory[name] = host_memory(tensor)
        return copy_to_host(tensor, memory)


def device_of(shards: dict[str, LocalShard]) -> torch.device:
    """Returns this rank's GPU if a tensor is on it, else the CPU."""
    return next((tensor.device for _, tensor in shards.values() if tensor.is_cuda), CPU)
