"""Choices by kind of device, and the places where the host waits for a device's numbers.

Both go through this module, so that a process without a GPU can stand in for one: a dry run runs the step of a rank on fake
tensors, which have shapes and no numbers.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class DryRun:
    """What stands in for a device: `kind` is the one that choices go by, `waits` counts the places where the host would wait."""

    kind: str
    waits: Counter[str] = field(default_factory=Counter)


_dry_run: DryRun | None = None


def kind_of(x: Tensor | torch.device) -> str:
    """`cpu` or `cuda`: every choice by kind of device goes by this."""
    if _dry_run is not None:
        return _dry_run.kind
    return x.type if isinstance(x, torch.device) else x.device.type


def host_read(x: Tensor, place: str, assumed: Callable[[], Any]) -> Any:
    """The numbers of `x`, as `Tensor.tolist` gives them. The host waits for the device.

    `place` is the name of this wait in docs/performance.md. `assumed` gives the numbers with which a dry run goes on.
    """
    if _dry_run is None:
        return x.tolist()
    _dry_run.waits[place] += 1
    return assumed()


@contextmanager
def dry_run(kind: str) -> Iterator[DryRun]:
    """Inside, tensors are taken to be on a device of this kind and to have no numbers. One at a time in a process."""
    global _dry_run
    assert _dry_run is None
    _dry_run = DryRun(kind)
    try:
        yield _dry_run
    finally:
        _dry_run = None
