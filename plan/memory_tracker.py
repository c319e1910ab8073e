"""Which memory of its device a rank has at each moment of a step, what each piece is for, and when it has most.

A storage is counted from the operator that returns it until nothing refers to it. FSDP frees and allocates with
`UntypedStorage.resize_`, which is no operator. What an operator allocates and frees inside is not seen. The same class follows a
dry run and a real rank, which is how the two are compared.
"""

import functools
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..parallel.progress import PROGRESS
from .ledger import device_type, phase

ROUNDING = 512
"""Bytes that torch's CUDA allocator rounds each allocation up to (c10/cuda/CUDACachingAllocator, kMinBlockSize)."""

ROOT = f"{Path(__file__).parents[1]}{os.sep}"
FSDP = os.path.join(os.path.dirname(torch.distributed.fsdp.__file__), "")  # noqa: PTH118, PTH120  the prefix of file names of code
MODES = torch._compile.__file__, torch._dynamo.eval_frame.__file__  # pyright: ignore[reportAttributeAccessIssue]
"""Code between an operator and a dispatch mode."""

PASSED_OVER = (
    "plan/",
    "tests/",
    "moe/linear.py",
    "moe/deferred.py",
    "moe/recompute.py",
    "moe/device.py",
    "moe/dropout.py",
    "moe/kernels/",
)
"""Code that works for its caller, whose place counts."""
WEIGHTS, GRADIENTS, OPTIMIZER, GATHERS, OTHER = "weights", "gradients", "optimizer", "gathered by FSDP", "other"
PURPOSES = {
    "moe/weight_cast.py": "casts of weights",
    "moe/attention.py": "activations: attention",
    "moe/continued_attention.py": "activations: attention",
    "moe/flexible_attention.py": "activations: attention",
    "moe/rotary.py": "activations: attention",
    "moe/delta_net.py": "activations: linear attention",
    "moe/router": "activations: router",
    "moe/kernel_router.py": "activations: router",
    "moe/scoring.py": "activations: router",
    "moe/softmax.py": "activations: router",
    "moe/balance.py": "activations: router",
    "moe/capacity.py": "activations: router",
    "moe/null_experts.py": "activations: router",
    "parallel/scopes.py": "activations: router",
    "moe/experts.py": "activations: experts",
    "moe/grouped_products.py": "activations: experts",
    "moe/dispatch.py": "activations: rows of experts",
    "moe/feedforward.py": "activations: feed-forward",
    "moe/": "activations: residual stream and norms",
    "parallel/dispatch/": "exchange buffers",
    "parallel/collectives.py": "exchange buffers",
    "parallel/context.py": "exchange buffers",
    "parallel/tensor.py": "exchange buffers",
    "parallel/pipeline/": "messages between stages",
    "parallel/vocabulary.py": "head and logits",
    "parallel/gradients.py": "gradients",
    "": OTHER,
}
"""What memory is for, by where it was allocated: the longest beginning of a file's name counts."""
UNSEEN = "not seen"
"""What a collective allocates inside: gloo copies what it reduces and scatters, NCCL has buffers of its own."""
BACKWARD = "gradients of activations"
"""What autograd allocates by itself in the backward pass."""


class Allocation:
    """A storage of one size. `purpose` may become known later, as that of gradients."""

    __slots__ = "bytes", "purpose"

    def __init__(self, size: int, purpose: str) -> None:
        self.bytes, self.purpose = size, purpose


Point = tuple[str, int | None]
"""The phase of a step, of all micro-batches together, and the layer that is running or ran last (parallel/progress.py)."""


class MemoryPeak:
    """The most memory at one point of the step, and what was alive then."""

    __slots__ = "bytes", "live"

    def __init__(self) -> None:
        self.bytes, self.live = 0, list[Allocation]()

    def by_purpose(self) -> Counter[str]:
        """Returns bytes by what they are for."""
        found = Counter[str]()
        for each in self.live:
            found[each.purpose] += each.bytes
        return found


class MemoryTracker(TorchDispatchMode):
    """A dispatch mode that follows the storages on devices of type `device`, each rounded up to `rounding` bytes."""

    def __init__(self, device: str, rounding: int = ROUNDING) -> None:
        super().__init__()
        self.device, self.rounding = device, rounding
        self.now = 0
        self.peaks: dict[Point, MemoryPeak] = {}
        self._live: dict[int, Allocation] = {}
        self._references: dict[int, Any] = {}
        self._rising: MemoryPeak | None = None
        """The point whose peak is now: what is alive is noted before that changes."""
        self._point: Point = ("", None)

    def __enter__(self) -> "MemoryTracker":
        self._resize = torch.UntypedStorage.resize_
        resize = self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func is torch.ops.aten.add.Tensor and _last_of_its_memory(*args):
            func = torch.ops.aten.add_.Tensor
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, Tensor) and not isinstance(x, DTensor) and device_type(x) == self.device:
                self._see(x.untyped_storage(), None)
        if func._opname == "chunk_cat":  # FSDP packs whole gradients, to reduce them
            self.mark(GRADIENTS, tree_leaves(args))
        return results

    def mark(self, purpose: str, tensors: Iterable[Any]) -> None:
        """Says what the memory of `tensors` is for, which is counted from now on at the latest."""
        for x in tensors:
            x = x.to_local() if isinstance(x, DTensor) else x
            if isinstance(x, Tensor) and device_type(x) == self.device:
                self._see(x.untyped_storage(), purpose)

    def mark_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Marks weights, buffers, the state of the optimizer, and gradients that are there."""
        parameters = list(model.parameters())
        self.mark(WEIGHTS, [*parameters, *model.buffers()])
        self.mark(GRADIENTS, [parameter.grad for parameter in parameters])
        self.mark(OPTIMIZER, [x for state in optimizer.state.values() for x in state.values()])

    def mark_gradients_of(self, model: nn.Module) -> None:
        """From now on, what a backward pass has added to the gradient of a parameter is marked as soon as it has."""
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda x: self.mark(GRADIENTS, [x.grad]))

    def restart(self) -> None:
        """Forgets the peaks; what is alive stays counted."""
        self.peaks.clear()
        self._rising = None

    def grow(self, size: int) -> None:
        """Adds memory of other purposes to each peak: what more micro-batches would have left there."""
        for peak in self.peaks.values():
            peak.bytes += size
            peak.live.append(Allocation(size, OTHER))

    def end(self) -> None:
        """Must be called after the last step, before `peaks` is read."""
        self._note()

    def _see(self, storage: torch.UntypedStorage, purpose: str | None) -> None:
        key = storage._cdata
        if (known := self._live.get(key)) is not None:
            known.purpose = purpose or known.purpose
            return
        purpose = purpose or purpose_here()
        if purpose != UNSEEN:
            self._references[key] = weakref.ref(storage, functools.partial(self._gone, key))
            self._add(key, storage.nbytes(), purpose)

    def _add(self, key: int, size: int, purpose: str) -> None:
        point = phase(), PROGRESS.layer
        if point != self._point:
            self._note()
            self._point = point
        allocation = Allocation(-(-size // self.rounding) * self.rounding, purpose)
        self._live[key] = allocation
        self.now += allocation.bytes
        peak = self.peaks.get(point)
        if peak is None:
            peak = self.peaks[point] = MemoryPeak()
        if self.now > peak.bytes:
            peak.bytes, self._rising = self.now, peak

    def _remove(self, key: int) -> Allocation | None:
        self._note()
        allocation = self._live.pop(key, None)
        self.now -= allocation.bytes if allocation is not None else 0
        return allocation

    def _gone(self, key: int, _: Any) -> None:
        self._remove(key)
        self._references.pop(key, None)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        allocation = self._remove(storage._cdata) if storage._cdata in self._live else None
        if allocation is not None:
            self._add(storage._cdata, storage.nbytes(), allocation.purpose)

    def _note(self) -> None:
        if self._rising is not None:
            self._rising.live, self._rising = list(self._live.values()), None


def _last_of_its_memory(gradient: Any, _: Any) -> bool:
    """Whether autograd is adding to a gradient that nobody else refers to.

    It adds in place then (`accumulate` of torch/csrc/autograd/input_buffer.cpp), but never while a dispatch mode is on. Here
    autograd and Python refer to the tensor, and the tensor and Python to its memory.
    """
    frame = sys._getframe(1).f_back
    while frame is not None and frame.f_code.co_filename in MODES:
        frame = frame.f_back
    if torch.is_grad_enabled() or (frame is not None and frame.f_code.co_filename != torch.autograd.graph.__file__):
        return False
    return gradient._use_count() == 4 and torch._C._storage_Use_Count(gradient.untyped_storage()._cdata) == 2


def purpose_here() -> str:
    """Returns what memory that the running code allocates is for, by the innermost place on the stack that says so."""
    frame = sys._getframe(1)
    while frame is not None:
        purpose = _purpose_of(frame.f_code.co_filename)
        if purpose is not None:
            return BACKWARD if purpose == OTHER and phase().startswith("backward") else purpose
        frame = frame.f_back
    return BACKWARD if phase().startswith("backward") else OTHER


@functools.cache
def _purpose_of(file: str) -> str | None:
    """Of code in `file`; None if the caller decides."""
    if file.startswith(FSDP):
        return GATHERS
    if file == distributed_c10d.__file__:
        return UNSEEN
    if file == torch.autograd.graph.__file__:  # on a GPU, where autograd has threads of its own, there is nothing behind it
        return BACKWARD
    name = file.removeprefix(ROOT).replace(os.sep, "/")
    if not file.startswith(ROOT) or name.startswith(PASSED_OVER) or "site-packages/" in name:
        return None
    return PURPOSES[max((start for start in PURPOSES if name.startswith(start)), key=len)]
