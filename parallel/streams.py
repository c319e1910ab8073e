"""CUDA streams, events, pinned memory and asynchronous copies. No other module creates any.

On a CPU work is done when a call returns, and so is every event. What happens depends on the device that a tensor is really on,
also in a dry run (moe/device.py): the simulated GPU of plan/stand_in.py has copies, but neither streams nor events.

Pinned memory comes from torch's cache (but for `host_buffer`), which reuses a block only after its tensor is freed and the copies
that read or wrote it are done. So nothing overwrites memory that can still be read.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Protocol, cast

import torch
from torch import Tensor

PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all CUDA contexts."""


def enter_thread(device: torch.device) -> None:
    """Must be called first in each thread that uses `device`: CUDA's current device is per thread, and 0 in a new one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


class Event:
    """A point in the work of a stream, made by `record_event`: done when all work queued before it is done."""

    def __init__(self, cuda: torch.cuda.Event | None) -> None:
        self._cuda, self._time = cuda, perf_counter()

    def done(self) -> bool:
        """Whether the event is done. Does not wait."""
        return self._cuda is None or self._cuda.query()

    def wait(self) -> None:
        """Blocks the HOST until the event is done. The training thread calls it inside `waiting_for_device`."""
        if self._cuda is not None:
            self._cuda.synchronize()


def record_event(device: torch.device, timed: bool = False) -> Event:
    """Returns an event behind all work queued in the device's current stream. `timed`: for use in `seconds_between`."""
    if device.type != "cuda":
        return Event(None)
    event = torch.cuda.Event(enable_timing=timed, blocking=True)
    event.record(torch.cuda.current_stream(device))
    return Event(event)


def seconds_between(first: Event, second: Event) -> float:
    """Returns the device time between two events recorded with `timed`. The host waits for the second."""
    second.wait()
    if first._cuda is None or second._cuda is None:
        return second._time - first._time
    return first._cuda.elapsed_time(second._cuda) / 1000


def stream_waits(event: Event, *tensors: Tensor) -> None:
    """Makes the current stream wait for `event` before work queued from now on; the host does not wait.

    `tensors` were made on another stream and are used on this one: their memory is not reused before this stream is done with it.
    """
    if event._cuda is None:
        return
    stream = torch.cuda.current_stream()
    stream.wait_event(event._cuda)
    for tensor in tensors:
        tensor.record_stream(stream)


class SideStream:
    """A second stream of `device`, which runs concurrently with the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def behind(self, event: Event, *tensors: Tensor) -> Iterator[None]:
        """Queues work of the block in this stream, behind `event`. `tensors` were made on other streams and are used inside.

        An event recorded inside lets the host (`Event.wait`) or the computing stream (`stream_waits`) wait for this work.
        """
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            stream_waits(event, *tensors)
            yield


class Graph(Protocol):
    """Captured work; `replay` queues all of it in the current stream."""

    def replay(self) -> None: ...


@contextmanager
def capture() -> Iterator[Graph]:
    """Captures the work that the block queues on a GPU as a CUDA graph, instead of doing it.

    The block must not wait for the device. Other threads may, and may copy. Raises RuntimeError if the work cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        yield graph


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies the host's tensor `x` to `device`, on a GPU asynchronously in its current stream."""
    return x.pin_memory().to(device, non_blocking=True) if device.type != "cpu" else x.to(device)


def host_memory(x: Tensor) -> Tensor:
    """Allocates host memory for a copy of `x`; pinned if `x` is on a GPU."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type != "cpu")


def host_buffer(size: int, device: torch.device) -> Tensor:
    """Allocates `size` bytes of host memory for copies of tensors on `device`; pinned for a GPU, until the buffer is freed.

    Torch's cache of pinned memory rounds to powers of two, up to twice the size. So this memory is registered with CUDA instead, as
    torch.distributed.checkpoint does (the simulated GPU has no registry). Whoever holds the buffer waits for copies before it is
    freed. Raises RuntimeError.
    """
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type not in ("cpu", "cuda"))
    if device.type == "cuda" and size:
        cudart, address = cast(Any, torch.cuda.cudart()), buffer.data_ptr()
        if failed := int(cudart.cudaHostRegister(address, size, PORTABLE)):
            raise RuntimeError(f"CUDA cannot pin {size:,} bytes of host memory: error {failed}")
        weakref.finalize(buffer.untyped_storage(), cudart.cudaHostUnregister, address)
    return buffer


def copy_to_host(x: Tensor, memory: Tensor) -> Tensor:
    """Copies `x` into `memory` and returns it. It must not be read before an event recorded after this call is done."""
    return memory.copy_(x.detach(), non_blocking=x.device.type != "cpu")


def copy_to_device(memory: Tensor, x: Tensor) -> Tensor:
    """Copies what `host_memory` gave into `x` and returns that. It must not be used before an event recorded after this call."""
    return x.copy_(memory, non_blocking=x.device.type != "cpu")


class HostCopy:
    """Tensors that are being copied to the host; see `to_host`."""

    def __init__(self, copies: list[Tensor], event: Event) -> None:
        self._copies, self._event = copies, event

    def done(self) -> bool:
        """Whether `get` returns without waiting."""
        return self._event.done()

    def get(self) -> list[Tensor]:
        """Waits for the copies and returns them. The training thread calls it inside `waiting_for_device`."""
        self._event.wait()
        return self._copies


def to_host(tensors: Sequence[Tensor]) -> HostCopy:
    """Starts to copy `tensors`, all on one device, in its current stream."""
    copies = [copy_to_host(x, host_memory(x)) for x in tensors]
    return HostCopy(copies, record_event(tensors[0].device))
