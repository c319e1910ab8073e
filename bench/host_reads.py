"""Counts the host synchronisations of a program by the place in our code.

On a GPU torch reports them (`set_sync_debug_mode`). On a CPU the calls that would synchronise are counted: numbers that the host
reads; operators that read numbers, or whose output has a size that only the device knows; and tensors created from host numbers on
a named `device`, since the host waits for a copy from memory that is not pinned.
"""

import functools
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount")
"""Operators that make the host of a GPU wait for a result."""


def host_reads(work: Callable[[], Any], device: torch.device) -> Counter[str]:
    """Runs `work`. Returns the number of synchronisations at each `file:line`; `outside` are those without a place in our code."""
    return _reported_by_torch(work) if device.type == "cuda" else _counted_on_cpu(work)


def _reported_by_torch(work: Callable[[], Any]) -> Counter[str]:
    found: Counter[str] = Counter()

    def count(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found[_caller()] += 1

    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(), patch.object(warnings, "showwarning", count):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return found


def _counted_on_cpu(work: Callable[[], Any]) -> Counter[str]:
    watch = _Watch()
    with ExitStack() as stack:
        for owner, name in ((Tensor, "tolist"), (Tensor, "new_tensor"), (torch, "tensor"), (torch, "as_tensor")):
            stack.enter_context(patch.object(owner, name, _counted(getattr(owner, name), watch.found, always=owner is Tensor)))
        stack.enter_context(watch)
        work()
    return watch.found


def _counted(function: Callable[..., Any], found: Counter[str], always: bool) -> Callable[..., Any]:
    """Counts calls of `function` that synchronise: all if `always`, else those with a named device and host numbers."""

    def call(*args: Any, **settings: Any) -> Any:
        if always or (settings.get("device") is not None and not isinstance(args[0], Tensor)):
            found[_caller()] += 1
        return function(*args, **settings)

    return call


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, settings = func._opname, kwargs or {}
        if (
            name in SYNCHRONISING
            or _has_unknown_size(name, args, settings)
            or (name == "segment_reduce" and not settings.get("unsafe"))
        ):
            self.found[_caller()] += 1
        return func(*args, **settings)


def _has_unknown_size(name: str, args: Any, settings: dict[str, Any]) -> bool:
    if name in ("index", "index_put", "index_put_"):
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name == "repeat_interleave" and isinstance(args[-1], Tensor) and settings.get("output_size") is None


def _caller() -> str:
    """Returns the innermost place on the stack in our code, apart from bench/, `host_read` and `keep` (their caller counts)."""
    frame = sys._getframe(1)
    while frame is not None:
        path = _ours(frame.f_code.co_filename)
        if path is not None and not re.match(r"bench/|moe/(device|recompute)\.py|\.venv/", path):
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


def _place(file: str, line: int) -> str:
    path = _ours(file)
    return "outside" if path is None else f"{path}:{line}"


@functools.cache
def _ours(file: str) -> str | None:
    """Returns the path within the repository, even if it was imported through a link; None for other files."""
    path = Path(file).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else None
