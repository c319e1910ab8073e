"""A device that stands in for a GPU in a dry run, its attention and norms, and the memory of other ranks.

Its tensors have shapes and no numbers.

It is torch's private-use device, with guards, streams and events that do nothing, and distinct from the host. Only fake tensors
can be on it. A process that registers it has it as its accelerator, and can no longer train.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # pyright: ignore[reportPrivateUsage]

from ..moe import attention, flexible_attention
from ..moe.recompute import keep
from ..parallel.dispatch import shared_memory
from ..parallel.mesh import Axis
from ..parallel.pipeline.p2p import Mail

NAME = "standin"


@functools.cache
def stand_in() -> torch.device:
    """Returns the device; the first call registers it."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    return torch.device(NAME, 0)


class _Event:
    """An event that has always completed."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> "_Event":
        return self

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Stream:
    """A stream whose work completes at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        pass

    def wait_event(self, *_: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _Event:
        return _Event()

    def synchronize(self) -> None:
        pass


class _Module:
    """The counterpart of `torch.cuda`, as far as FSDP2, recomputation and fake tensors need it."""

    Stream, Event = _Stream, _Event

    def __init__(self) -> None:
        self._stream = _Stream()

    def is_available(self) -> bool:
        """False, so that fake tensors copy nothing to it."""
        return False

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def manual_seed_all(self, seed: int) -> None:
        pass

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def current_stream(self, *_: Any) -> _Stream:
        return self._stream

    def stream(self, *_: Any) -> Any:
        return nullcontext()


# Attention in a dry run saves what a GPU kernel saves, not (B, H, S, S) scores.


@contextmanager
def fused_attention_stand_in(operators: Counter[str]) -> Iterator[None]:
    """Makes attention save what GPU kernels save: queries, keys, values, output, and one number for each query.

    `operators` counts it, as no operator is called in its place.
    """
    with ExitStack() as undo:
        for module, name, replacement in (
            (attention, "fused_attention", lambda q, k, v, *_: _Fused.apply(q, k, v, keep, operators)[0]),
            (flexible_attention, "flexible_attention", lambda q, k, v, *_: _Fused.apply(q, k, v, _repeat, operators)),
        ):
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, replacement)
        yield


def _repeat(function: Callable[[], Tensor]) -> Tensor:
    """Of a compiled function `keep` keeps no operator."""
    return function()


class _Fused(torch.autograd.Function):
    """Outputs (B, H, S, v) in the memory layout (B, S, H, v), and logsumexp (B, H, S)."""

    @staticmethod
    def forward(
        ctx: Any, q_BHSh: Tensor, k_BGTh: Tensor, v_BGTv: Tensor, output: Callable[..., Tensor], operators: Counter[str]
    ) -> tuple[Tensor, Tensor]:
        ctx.operators = operators
        operators["attention"] += 1
        sequences, heads, length, _ = q_BHSh.shape
        y_BSHv = output(lambda: q_BHSh.new_empty(sequences, length, heads, v_BGTv.shape[-1]))
        logsumexp_BHS = output(lambda: q_BHSh.new_empty(sequences, heads, length, dtype=torch.float32))
        y_BHSv = y_BSHv.transpose(1, 2)
        ctx.save_for_backward(q_BHSh, k_BGTh, v_BGTv, y_BHSv, logsumexp_BHS)
        return y_BHSv, logsumexp_BHS

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.operators["attention_backward"] += 1
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None, None


@contextmanager
def fused_norms_stand_in(key: str) -> Iterator[None]:
    """Gives the backend of dispatch key `key` the operators of RMSNorm that torch has kernels for on CUDA and not elsewhere.

    Without one, torch.rms_norm is seven operators, which save two wide copies of the input. With one, autograd has one node, which
    saves the input and the inverse root of each row (derivatives.yaml of torch).
    """
    library = torch.library.Library("aten", "IMPL", key)
    try:
        for operator in (torch.ops.aten._fused_rms_norm.default, torch.ops.aten._fused_rms_norm_backward.default):
            library.impl(operator, decomposition_table[operator])
        yield
    finally:
        library._destroy()


class _MemoryOfOthers(shared_memory.SharedMemory):
    """Memory of ranks that are not there. Without numbers, this rank's own can stand for that of the others."""

    def __init__(self, axis: Axis, size: int, device: torch.device) -> None:
        super().__init__(axis, axis.size * [torch.empty(size, dtype=torch.uint8, device=device)])

    def addresses(self) -> Tensor:
        return torch.empty(self.axis.size, dtype=torch.int64, device=self.peers[0].device)

    def barrier(self) -> None:
        pass


@contextmanager
def messages_leave() -> Iterator[None]:
    """Makes a message to another stage leave, and frees its memory, before the next one. In the fake group none ever does."""
    asked, Mail._on_their_way = Mail._on_their_way, lambda self: iter(())
    try:
        yield
    finally:
        Mail._on_their_way = asked


@contextmanager
def shared_memory_stand_in() -> Iterator[None]:
    """Makes the symmetric exchange put rows into fake tensors."""
    opened, shared_memory.open_memory = shared_memory.open_memory, _MemoryOfOthers
    try:
        yield
    finally:
        shared_memory.open_memory = opened
