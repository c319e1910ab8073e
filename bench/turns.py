"""Time and memory of work on a device: events on a GPU, the clock of the host on a CPU. Sides of a comparison take turns.

On a machine that others use too, only what ran in the same minute can be compared.
"""

import gc
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from .figures import rotated

Work = Callable[[], Any]


def take_turns(
    works: dict[str, Work], device: torch.device, repeats: int, warm_up: int = 1, reset: Work = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each repeat, by name. A repeat is one run of each work, in another order every time.

    `reset` comes before each, outside of the time.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(-warm_up, repeats):
        for name in rotated(list(works), repeat):
            reset()
            seconds = timed(works[name], device)
            taken[name] += [seconds] if repeat >= 0 else []
    return taken


def timed(work: Work, device: torch.device) -> float:
    """Seconds from an idle device to the end of the work, launches included."""
    if device.type != "cuda":
        start = perf_counter()
        work()
        return perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def peak_bytes(work: Work, device: torch.device) -> int | None:
    """The most memory that the work holds at once above what was held before; None on a CPU, which does not count."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
