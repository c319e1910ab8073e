"""Records what a rank does on its device, operator by operator: collectives, host synchronisations, misplaced tensors."""

import functools
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..parallel.progress import PROGRESS

ROOT = Path(__file__).parents[1]
KINDS = ("allreduce", "allgather", "reduce_scatter", "alltoall", "broadcast", "barrier", "gather", "scatter", "reduce")
COPIES = ("_to_copy", "copy_")
CHECKING = ("segment_reduce",)
"""Operators that read numbers on the host only to check their arguments."""
IDLE = ("new_empty", "new_empty_strided", "empty_like", "resize_", "set_", "promote_types", "lift_fresh")
"""Operators that launch no kernel, besides views."""


class UnknownNumbers(RuntimeError):
    """The host reads a number of the device, and there is no device."""


class Collective(NamedTuple):
    """A collective, by what the members of its group must agree on."""

    kind: str
    ranks: tuple[int, ...]
    dtype: str
    elements: int | None
    """Elements of the larger side; None for an all-to-all, which may be uneven."""


class Call(NamedTuple):
    """A collective, or a message to or from another rank, with when it was called and its size."""

    phase: str
    kind: str
    ranks: tuple[int, ...]
    """The members of the group; both ends of a message."""
    dtype: str
    bytes: int
    """Of the larger side."""


class Message(NamedTuple):
    """A tensor that a rank sends to another, or receives from it. Ranks are those of the world."""

    group: tuple[int, ...]
    sender: int
    receiver: int
    dtype: str
    elements: int


class Ledger(TorchDispatchMode):
    """A dispatch mode, inside of a fake tensor mode, that sees each operator. `device` is the device type of the stand-in."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.collectives: list[Collective] = []
        self.calls: Counter[Call] = Counter()
        """How often each collective and message was called."""
        self.operators: Counter[str] = Counter()
        """Operators by name that compute something from tensors of the device."""
        self.sent: list[Message] = []
        self.received: list[Message] = []
        self.waits: Counter[str] = Counter()
        """Host synchronisations by `file:line`, apart from those named in moe/device.py. UnknownNumbers is raised if the step
        cannot
        continue without the number."""
        self.strangers: Counter[str] = Counter()
        """Host tensors in an operator of the device or in a collective, by `file:line operator`."""
        self._pinned: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        namespace, name = func.namespace, func._opname
        if namespace == "prim":
            return func(*args, **kwargs)
        if name == "is_pinned":
            return StorageWeakRef(args[0].untyped_storage()) in self._pinned
        if name == "_pin_memory":
            return self._pin(args[0].clone())
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [device_type(x) == self.device for x in tensors]
        self._place(namespace, name, here)
        if namespace == "c10d":
            self._collective(name, args, tensors)
        elif any(here) and not func.is_view and name not in IDLE:
            self.operators[name] += 1
        if name in COPIES:
            self._copy(name, args, kwargs)
        elif name in CHECKING and not kwargs.get("unsafe", False):
            self.waits[caller()] += 1
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise UnknownNumbers(f"{caller()}: {name} reads numbers of the device, outside of host_read") from None
        return self._pin(out) if kwargs.get("pin_memory") and out.device.type == "cpu" else out

    def _pin(self, x: Tensor) -> Tensor:
        self._pinned.add(StorageWeakRef(x.untyped_storage()))
        return x

    def _place(self, namespace: str, name: str, here: list[bool]) -> None:
        if name in COPIES or all(here):
            return
        if any(here) or (namespace == "c10d" and name != "barrier"):
            self.strangers[f"{caller()} {name}"] += 1

    def _collective(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        group = next(
            leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type())
        )
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
        dtype, size = str(tensors[0].dtype) if tensors else "", max((x.numel() * x.element_size() for x in tensors), default=0)
        if name in ("send", "recv_"):
            mine, other = dist.get_rank(), ranks[args[2]]
            ends = (mine, other) if name == "send" else (other, mine)
            kept = self.sent if name == "send" else self.received
            kept.append(Message(ranks, *ends, dtype, tensors[0].numel()))
            self.calls[Call(phase(), name.rstrip("_"), ends, dtype, size)] += 1
            return
        kind = next(kind for kind in KINDS if kind in name)
        elements = None if kind == "alltoall" else max((x.numel() for x in tensors), default=0)
        self.collectives.append(Collective(kind, ranks, dtype, elements))
        self.calls[Call(phase(), kind, ranks, dtype, size)] += 1

    def _copy(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """A copy between host and device synchronises, unless it is asynchronous and the host memory is pinned."""
        if name == "copy_":
            target, source = args[:2]
            target_kind, asynchronous = target.device.type, args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            target, source = None, args[0]
            target_kind, asynchronous = (kwargs.get("device") or source.device).type, kwargs.get("non_blocking", False)
        if (source.device.type == self.device) == (target_kind == self.device):
            return
        host = source if target_kind == self.device else target  # None: an asynchronous `to` allocates pinned memory
        if not asynchronous or (host is not None and StorageWeakRef(host.untyped_storage()) not in self._pinned):
            self.waits[caller()] += 1


def device_type(x: Tensor) -> str:
    """The type of the device of x, without an operator, which the device of a fake tensor is under a dispatch mode."""
    return (x.fake_device if isinstance(x, FakeTensor) else x.device).type


def phase() -> str:
    """Returns the phase of the step, without the number of the micro-batch."""
    return _without_micro_batch(PROGRESS.phase)


@functools.cache
def _without_micro_batch(name: str) -> str:
    return re.sub(r" of micro-batch \d+", "", name)


def caller() -> str:
    """Returns the innermost `file:line` on the stack in our code, apart from this folder; `outside` if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and (place := path.relative_to(ROOT).as_posix()).split("/")[0] not in ("plan", ".venv"):
            return f"{place}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"
