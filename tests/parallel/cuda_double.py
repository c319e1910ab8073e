"""A double of the few torch.cuda calls that the project makes, for a machine without a GPU: it records them, by thread, and does
the work that a stream was given only when somebody waits for it. So who waits for the wrong stream reads memory that is not filled.

As in CUDA the current device belongs to a thread and is 0 in a new one, and a copy goes to its device's current stream.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor


class Call(NamedTuple):
    thread: str
    what: str
    where: Any = None
    """Returns the stream, or the index of the device."""


class FakeStream:
    """`queue` is the work that is not done."""

    def __init__(self, double: "CudaDouble", device: int, name: str) -> None:
        self.double, self.device, self.name = double, device, name
        self.queue: list[Callable[[], None]] = []
        self.given = self.finished = 0

    def __repr__(self) -> str:
        return self.name

    def give(self, work: Callable[[], None]) -> None:
        self.queue.append(work)
        self.given += 1

    def run(self, until: int) -> None:
        while self.finished < until:
            self.finished += 1
            self.queue.pop(0)()

    def wait_event(self, event: "FakeEvent") -> None:
        self.double.note("wait_event", self)
        self.give(event.reach)

    def synchronize(self) -> None:
        self.double.note("stream.synchronize", self)
        self.run(self.given)


class FakeEvent:
    def __init__(self, double: "CudaDouble", timed: bool) -> None:
        self.double, self.timed = double, timed
        self.stream: FakeStream | None = None
        self.place, self.time = 0, 0.0

    def record(self, stream: FakeStream | None = None) -> None:
        self.stream = stream or self.double.current_stream()
        self.double.note("record", self.stream)
        self.stream.give(self._stamp)
        self.place = self.stream.given

    def _stamp(self) -> None:
        self.double.clock += 1.0
        self.time = self.double.clock

    def reach(self) -> None:
        if self.stream is not None:
            self.stream.run(self.place)

    def synchronize(self) -> None:
        self.double.note("event.synchronize", self.stream)
        self.reach()

    def query(self) -> bool:
        return self.stream is None or self.stream.finished >= self.place

    def elapsed_time(self, other: "FakeEvent") -> float:
        assert self.timed and other.timed
        assert self.query() and other.query()
        return (other.time - self.time) * 1000


class OnCuda(Tensor):
    """A host tensor that claims to be on cuda:`index`; copies from it are queued in a stream."""

    double: "CudaDouble"
    index: int

    @property
    def is_cuda(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return True

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.device("cuda", self.index)

    def detach(self) -> Tensor:
        return self

    def record_stream(self, s: Any) -> None:
        self.double.note("record_stream", s)

    def cpu(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        stream = self.double.current_stream(self.index)
        self.double.note("cpu", stream)
        stream.run(stream.given)
        return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.copy_:
            out = super().__torch_function__(func, types, args, kwargs)
            if isinstance(out, OnCuda) and "double" not in vars(out) and isinstance(args[0], OnCuda):  # a view
                out.double, out.index = args[0].double, args[0].index
            return out
        memory, source = args
        there = source if isinstance(source, OnCuda) else memory
        stream = there.double.current_stream(there.index)
        there.double.note("copy" if there is source else "copy to device", stream)
        with torch._C.DisableTorchFunctionSubclass():
            stream.give(lambda: memory.as_subclass(Tensor).copy_(source.as_subclass(Tensor)))
        if not (kwargs or {}).get("non_blocking"):
            stream.run(stream.given)
        return memory


class CudaDouble:
    """Replaces torch.cuda; see `installed`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.clock = 0.0
        self.pinned: list[int] = []
        """`data_ptr` of tensors created in, or copied to, pinned memory."""
        self._local = threading.local()
        self._defaults: dict[int, FakeStream] = {}

    def note(self, what: str, where: Any = None) -> None:
        self.calls.append(Call(threading.current_thread().name, what, where))

    def of(self, thread: str) -> list[tuple[str, Any]]:
        """What a thread did: pairs of the call and the stream's name or the device."""
        return [(call.what, where_of(call.where)) for call in self.calls if call.thread == thread]

    def cudart(self) -> "CudaDouble":
        return self

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.pinned.append(address)
        ctypes.memset(address, 0xFF, size)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.pinned.remove(address)
        return 0

    def tensor(self, values: Tensor, device: int) -> OnCuda:
        x = values.clone().as_subclass(OnCuda)
        x.double, x.index = self, device
        return x

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return getattr(self._local, "device", 0)

    def set_device(self, device: torch.device | int) -> None:
        self._local.device = index_of(device)
        self.note("set_device", self._local.device)

    def current_stream(self, device: torch.device | int | None = None) -> FakeStream:
        index = self.current_device() if device is None else index_of(device)
        default = self._defaults.setdefault(index, FakeStream(self, index, f"cuda:{index} default"))
        return getattr(self._local, "streams", {}).get(index, default)

    def Stream(self, device: torch.device | int | None = None) -> FakeStream:
        index = self.current_device() if device is None else index_of(device)
        stream = FakeStream(self, index, f"cuda:{index} side")
        self.note("Stream", stream)
        return stream

    def Event(self, enable_timing: bool = False, blocking: bool = False) -> FakeEvent:
        return FakeEvent(self, enable_timing)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        device, streams = self.current_device(), getattr(self._local, "streams", {})
        self._local.device, self._local.streams = stream.device, {**streams, stream.device: stream}
        yield
        self._local.device, self._local.streams = device, streams


def where_of(where: Any) -> Any:
    return where.name if isinstance(where, FakeStream) else where


def index_of(device: torch.device | int) -> int:
    return device if isinstance(device, int) else device.index


def installed(monkeypatch: pytest.MonkeyPatch) -> CudaDouble:
    """Replaces torch.cuda, pinned memory and copies to a device by a double, until the test ends."""
    double = CudaDouble()
    empty, move = torch.empty, Tensor.to
    for name in ("is_initialized", "current_device", "set_device", "current_stream", "Stream", "Event", "stream", "cudart"):
        monkeypatch.setattr(torch.cuda, name, getattr(double, name))

    def pinned_empty(*args: Any, pin_memory: bool = False, device: Any = None, **kwargs: Any) -> Tensor:
        if device is not None and device.type == "cuda":
            return double.tensor(empty(*args, **kwargs).fill_(-1), device.index)
        memory = empty(*args, device=device, **kwargs)
        if pin_memory:
            double.pinned.append(memory.data_ptr())
            memory.fill_(-1)
        return memory

    def pin(x: Tensor) -> Tensor:
        copy = x.clone()
        double.pinned.append(copy.data_ptr())
        return copy

    def to(x: Tensor, *args: Any, non_blocking: bool = False, **kwargs: Any) -> Tensor:
        if not (args and isinstance(args[0], torch.device) and args[0].type == "cuda"):
            return move(x, *args, non_blocking=non_blocking, **kwargs)
        assert non_blocking == (x.data_ptr() in double.pinned)
        double.note("copy to device", double.current_stream(args[0]))
        return double.tensor(x, args[0].index)

    monkeypatch.setattr(torch, "empty", pinned_empty)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    return double


COPIED_ASIDE = [
    ("set_device", 1),
    ("Stream", "cuda:1 side"),
    ("wait_event", "cuda:1 side"),
    ("record_stream", "cuda:1 side"),
    ("copy", "cuda:1 side"),
    ("record", "cuda:1 side"),
    ("event.synchronize", "cuda:1 side"),
]
"""Calls of a thread that copies one tensor of cuda:1 to the host, on a stream of its own, and waits for it."""
