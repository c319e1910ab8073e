"""Where a program makes the host wait for the device: each place in our code, and how often.

On a GPU torch itself tells (`set_sync_debug_mode`). On a CPU the same calls are counted by what they are: numbers read by the host,
operators that read some or whose output has a size that only the device knows, and tensors made of the host's numbers on a `device`
that is named, since memory that is not pinned is copied while the host waits.
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
"""Operators after which a GPU's host knows what was computed."""


def host_reads(work: Callable[[], Any], device: torch.device) -> Counter[str]:
    """Runs `work`; how often the host waited at each place, as `file:line`; `outside` is beyond our code (on a GPU: any other)."""
    return _told_by_torch(work) if device.type == "cuda" else _seen_on_cpu(work)


def _told_by_torch(work: Callable[[], Any]) -> Counter[str]:
    found: Counter[str] = Counter()

    def told(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found[_caller()] += 1

    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(), patch.object(warnings, "showwarning", told):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return found


def _seen_on_cpu(work: Callable[[], Any]) -> Counter[str]:
    watch = _Watch()
    with ExitStack() as stack:
        for owner, name in ((Tensor, "tolist"), (Tensor, "new_tensor"), (torch, "tensor"), (torch, "as_tensor")):
            stack.enter_context(patch.object(owner, name, _counted(getattr(owner, name), watch.found, always=owner is Tensor)))
        stack.enter_context(watch)
        work()
    return watch.found


def _counted(function: Callable[..., Any], found: Counter[str], always: bool) -> Callable[..., Any]:
    """`function`, which makes the host wait `always`, or where a device is named and the numbers are the host's."""

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
        if name in SYNCHRONISING or _has_unknown_size(name, args, settings) or _checks_numbers(name, settings):
            self.found[_caller()] += 1
        return func(*args, **settings)


def _has_unknown_size(name: str, args: Any, settings: dict[str, Any]) -> bool:
    if name in ("index", "index_put", "index_put_"):
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name == "repeat_interleave" and isinstance(args[-1], Tensor) and settings.get("output_size") is None


def _checks_numbers(name: str, settings: dict[str, Any]) -> bool:
    return name == "segment_reduce" and not settings.get("unsafe")


def _caller() -> str:
    """The innermost place of ours on the stack, but for bench/ and `host_read`, whose caller it is."""
    frame = sys._getframe(1)
    while frame is not None:
        path = _ours(frame.f_code.co_filename)
        if path is not None and not re.match(r"bench/|moe/device\.py|\.venv/", path):
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


def _place(file: str, line: int) -> str:
    path = _ours(file)
    return "outside" if path is None else f"{path}:{line}"


@functools.cache
def _ours(file: str) -> str | None:
    """The path in the repository, which may have been imported through a link; None for other files."""
    path = Path(file).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else None
