"""Where a program makes the host wait for the device: each place in our code, and how often.

On a GPU torch itself tells (`set_sync_debug_mode`). On a CPU the same calls are counted by what they are: numbers read by the host,
and operators whose output has a size that only the device knows.
"""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
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
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    return Counter(_place(warning.filename, warning.lineno) for warning in found)


def _seen_on_cpu(work: Callable[[], Any]) -> Counter[str]:
    watch = _Watch()
    tolist = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        watch.found[_caller()] += 1
        return tolist(tensor)

    with patch.object(Tensor, "tolist", counted), watch:
        work()
    return watch.found


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, settings = func._opname, kwargs or {}
        if name in SYNCHRONISING or _has_unknown_size(name, args, settings):
            self.found[_caller()] += 1
        return func(*args, **settings)


def _has_unknown_size(name: str, args: Any, settings: dict[str, Any]) -> bool:
    if name in ("index", "index_put", "index_put_"):
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name == "repeat_interleave" and isinstance(args[-1], Tensor) and settings.get("output_size") is None


def _caller() -> str:
    """The innermost place of ours on the stack, but for this file and the rest of bench/."""
    frame = sys._getframe(1)
    while frame is not None:
        path = _ours(frame.f_code.co_filename)
        if path is not None and not re.match(r"bench/|\.venv/", path):
            return _place(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return "outside"


def _place(file: str, line: int) -> str:
    path = _ours(file)
    return "outside" if path is None else f"{path}:{line}"


@cache
def _ours(file: str) -> str | None:
    """The path in the repository, which may have been imported through a link; None for other files."""
    path = Path(file).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else None
