"""CUDA streams, events, pinned memory and asynchronous copies: all that the project makes of them is made here.

On a CPU nothing is made: work is done when the call returns, and so is every event. Choices go by the device that a tensor is
really on, also in a dry run (moe/device.py), whose stand-in for a GPU (plan/stand_in.py) has copies and neither streams nor events.

Pinned memory comes from torch's cache, which gives a block out again when its tensor is gone and the copies that read or wrote it
are done: so it is re-used, and never rewritten while somebody can read it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor


def enter_thread(device: torch.device) -> None:
    """First in each thread that works with `device`: CUDA's current device belongs to a thread, and is 0 in a new one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


class Event:
    """A place in the work of a stream, made by `record`: done when all that the stream was given before is done."""

    def __init__(self, cuda: torch.cuda.Event | None) -> None:
        self._cuda, self._time = cuda, perf_counter()

    def done(self) -> bool:
        """Waits for nothing."""
        return self._cuda is None or self._cuda.query()

    def wait(self) -> None:
        """The HOST waits. The thread that trains calls it inside `waiting_for_device`."""
        if self._cuda is not None:
            self._cuda.synchronize()


def record(device: torch.device, timed: bool = False) -> Event:
    """An event behind all that the device's current stream was given until now. `timed`: for `seconds_between`."""
    if device.type != "cuda":
        return Event(None)
    event = torch.cuda.Event(enable_timing=timed, blocking=True)
    event.record(torch.cuda.current_stream(device))
    return Event(event)


def seconds_between(first: Event, second: Event) -> float:
    """Of the device's time, between two events recorded with `timed`. The host waits for the second."""
    second.wait()
    if first._cuda is None or second._cuda is None:
        return second._time - first._time
    return first._cuda.elapsed_time(second._cuda) / 1000


def stream_waits(event: Event, *tensors: Tensor) -> None:
    """What the current stream is given from here on begins behind `event`; the host goes on.

    tensors: made on another stream, and used on this one: their memory is not given out again before this stream is done with it.
    """
    if event._cuda is None:
        return
    stream = torch.cuda.current_stream()
    stream.wait_event(event._cuda)
    for tensor in tensors:
        tensor.record_stream(stream)


class SideStream:
    """A stream of `device` beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def behind(self, event: Event, *tensors: Tensor) -> Iterator[None]:
        """What runs inside is given to this stream, and begins behind `event`. `tensors`: of other streams, used inside.

        `record` inside gives an event behind it: for the host (`wait`), or for the stream that computes (`stream_waits`).
        """
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            stream_waits(event, *tensors)
            yield


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """The host's tensor `x` on `device`. A GPU copies when its current stream comes to it, and the host goes on."""
    return x.pin_memory().to(device, non_blocking=True) if device.type != "cpu" else x.to(device)


def host_memory(x: Tensor) -> Tensor:
    """Memory of the host for a copy of `x`; pinned for a GPU's."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type != "cpu")


def copy_to_host(x: Tensor, memory: Tensor) -> Tensor:
    """`x` into `memory`, which must not be read before an event recorded behind this is done. Returns `memory`."""
    return memory.copy_(x.detach(), non_blocking=x.device.type != "cpu")


class HostCopy:
    """Tensors on their way to the host, made by `to_host`."""

    def __init__(self, copies: list[Tensor], event: Event) -> None:
        self._copies, self._event = copies, event

    def done(self) -> bool:
        """Whether `get` returns at once."""
        return self._event.done()

    def get(self) -> list[Tensor]:
        """The tensors as they were, on the host, which waits for them. The thread that trains: inside `waiting_for_device`."""
        self._event.wait()
        return self._copies


def to_host(tensors: Sequence[Tensor]) -> HostCopy:
    """Copies of `tensors`, all on one device, made when its current stream comes to it; to be read later, with `get`."""
    copies = [copy_to_host(x, host_memory(x)) for x in tensors]
    return HostCopy(copies, record(tensors[0].device))
