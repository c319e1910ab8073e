"""The kind of device, and host reads, where the host waits for a device's numbers.

Both go through this module, so that a process without a GPU can simulate one: a dry run executes the step of a rank on fake
tensors, which have shapes and no values.
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
    """A simulated device of `kind`; `waits` counts host reads by name."""

    kind: str
    waits: Counter[str] = field(default_factory=Counter)


_dry_run: DryRun | None = None


def kind_of(x: Tensor | torch.device) -> str:
    """Returns `cpu` or `cuda`; everything that depends on the kind of device asks here."""
    if _dry_run is not None:
        return _dry_run.kind
    return x.type if isinstance(x, torch.device) else x.device.type


def host_read(x: Tensor, place: str, assumed: Callable[[], Any]) -> Any:
    """Returns `x.tolist()`, for which the host waits for the device.

    `place` is the name of this read in docs/performance.md. A dry run continues with the numbers that `assumed` returns.
    """
    if _dry_run is None:
        return x.tolist()
    _dry_run.waits[place] += 1
    return assumed()


@contextmanager
def dry_run(kind: str) -> Iterator[DryRun]:
    """Treats tensors as if they were on a device of this kind and had no values. Only one at a time in a process."""
    global _dry_run
    assert _dry_run is None
    _dry_run = DryRun(kind)
    try:
        yield _dry_run
    finally:
        _dry_run = None
