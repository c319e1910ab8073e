"""Copies of a save's pieces in host memory, made by its thread beside the next forward and backward pass.

Weights and moments change in the optimizer's update alone, so only the update has to wait for them (DataStates-LLM's lazy copies,
arXiv 2406.10707).
"""

from threading import Event
from time import perf_counter
from typing import Any

import torch

from ...parallel.pieces import Held


class Copies:
    """Memory that is kept from save to save (pinned, for a GPU). `take` runs in the thread, the rest in the training."""

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}
        self._done = Event()
        self._done.set()
        self._ready: Any = None

    def open(self) -> None:
        """From here on what is to be copied must not change."""
        self._done.clear()
        if torch.cuda.is_initialized():
            self._ready = torch.cuda.Event()
            self._ready.record()

    def wait(self) -> float:
        """Until it may change; seconds."""
        begin = perf_counter()
        self._done.wait()
        return perf_counter() - begin

    def take(self, held: dict[str, Held]) -> dict[str, Held]:
        """The same pieces on the host. RuntimeError if one has changed meanwhile."""
        try:
            versions = {name: one.tensor._version for name, one in held.items()}
            copied = self._on_a_stream_of_its_own(held) if self._ready is not None else self._copied(held)
            changed = [name for name, one in held.items() if one.tensor._version != versions[name]]
            if changed:
                raise RuntimeError(f"tensor {changed[0]!r} changed while it was copied")
            return copied
        finally:
            self._done.set()

    def _on_a_stream_of_its_own(self, held: dict[str, Held]) -> dict[str, Held]:
        """Beside the computation, after what was computed before `open`."""
        stream = torch.cuda.Stream()
        stream.wait_event(self._ready)
        with torch.cuda.stream(stream):
            copied = self._copied(held)
        stream.synchronize()
        return copied

    def _copied(self, held: dict[str, Held]) -> dict[str, Held]:
        copied = {}
        for name, (piece, tensor) in held.items():
            memory = self._memory.get(name)
            if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
                memory = self._memory[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copied[name] = Held(piece, memory.copy_(tensor.detach(), non_blocking=True))
        return copied
