"""The kind of device, whether Triton kernels run on it, and host reads, where the host waits for a device's numbers.

All go through this module, so that a process without a GPU can simulate one: a dry run executes the step of a rank on fake
tensors, which have shapes and no values.
"""

import importlib.util
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .recompute import keep

log = logging.getLogger("tokenyard")
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass
class DryRun:
    """A simulated device of `kind`; `waits` counts host reads by name."""

    kind: str
    hot: float = 1.0
    """The rows that the experts of this rank receive, over their number at an even load."""
    waits: Counter[str] = field(default_factory=Counter)


_dry_run: DryRun | None = None


def kind_of(x: Tensor | torch.device) -> str:
    """Returns `cpu` or `cuda`; everything that depends on the kind of device asks here."""
    if _dry_run is not None:
        return _dry_run.kind
    return x.type if isinstance(x, torch.device) else x.device.type


def is_simulated() -> bool:
    """Whether this is a dry run."""
    return _dry_run is not None


def constant_when_compiled(function: Function) -> Function:
    """torch.compiler.assume_constant_result, but without importing the compiler, which takes a second at each start."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


KERNELS = True
"""False to compare moe/kernels/ with the code that they replace."""
KERNELS_LACK = [
    *(["triton"] if importlib.util.find_spec("triton") is None else []),
    *([] if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") else ["a C compiler, which triton calls"]),
]
"""What kernels need and this machine has not."""
KERNEL_DTYPES = torch.bfloat16, torch.float16, torch.float32, torch.int64
"""Kernels sum in fp32; fp64 stays with the code that they replace. Ids of experts are int64."""


def uses_kernels(x: Tensor) -> bool:
    """Returns whether moe/kernels/ takes tensors like x. A dry run, whose tensors only stand for those of a GPU, lacks nothing."""
    return KERNELS and kind_of(x) == "cuda" and x.dtype in KERNEL_DTYPES and (not KERNELS_LACK or x.device.type != "cuda")


def warn_of_missing_kernels(device: torch.device) -> None:
    """Warns in one line if a GPU has to do without kernels. The factor is that of a Qwen3-30B layer (docs/performance.md)."""
    if device.type == "cuda" and KERNELS_LACK:
        lacks = " and ".join(KERNELS_LACK)
        log.warning("no Triton kernels without %s: a layer of fine-grained experts takes up to 1.7 times as long", lacks)


def host_read(x: Tensor, place: str, assumed: Callable[[], Any]) -> Any:
    """Returns `x.tolist()`, for which the host waits for the device.

    `place` is the name of this read in docs/performance.md. A dry run continues with the numbers that `assumed` returns.
    """
    return keep(partial(_read, x, place, assumed))


def _read(x: Tensor, place: str, assumed: Callable[[], Any]) -> Any:
    if _dry_run is None:
        return x.tolist()
    _dry_run.waits[place] += 1
    return assumed()


def hot_rows(rows: int) -> int:
    """Returns how many rows a dry run assumes to arrive where `rows` do at an even load."""
    assert _dry_run is not None
    return round(rows * _dry_run.hot)


@contextmanager
def dry_run(kind: str, hot: float = 1.0) -> Iterator[DryRun]:
    """Treats tensors as if they were on a device of this kind and had no values. Only one at a time in a process."""
    global _dry_run
    assert _dry_run is None
    _dry_run = DryRun(kind, hot)
    try:
        yield _dry_run
    finally:
        _dry_run = None
