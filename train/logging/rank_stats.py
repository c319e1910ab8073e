"""Memory of all ranks and how long they waited, for logged steps: the worst rank, which one it is, and the mean.

The counters are on the host, also those of torch's allocator, so that nothing waits for the device. Two small all-reduces carry
them over the ranks; the sums travel to the host with the other numbers of the step. N ranks, K counters.
"""

import os
import resource
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...parallel.collectives import max_over, sum_over
from ...parallel.streams import on_device
from ..config.environment import local_world_size
from ..session import Session
from .step_log import Waits

STATUS = Path("/proc/self/status")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""The memory that a container may use, in bytes, or the word max."""

RANKS = 2**20
"""More than there are ranks: a counter of the worst rank travels as counter x RANKS + RANKS - 1 - rank."""
MILLION = 10**6
"""Shares travel in millionths, times in microseconds."""

MEMORY = {
    "allocated": "system/memory_allocated_gb",
    "reserved": "system/memory_reserved_gb",
    "resident": "system/memory_resident_gb",
    "peak": "system/memory_peak_gb",
}


class Counters(NamedTuple):
    """Those of one rank, as whole numbers. Bytes are those of its device, on a CPU of its process."""

    allocated: int | None
    """Bytes of tensors; None on a CPU."""
    reserved: int | None
    """Bytes that torch's allocator holds; None on a CPU."""
    resident: int
    """Bytes of the process in the host's memory."""
    peak: int
    """The most bytes of tensors since training began; on a CPU the most bytes of the process."""
    share: int
    """The most bytes that were taken from the device over those that it has, in millionths. On a CPU the ranks of a host have equal
    parts of its memory."""
    retries: int | None
    """How often the allocator had to free its cache for want of memory; None on a CPU."""
    exchanged: int
    """Microseconds in collectives since the last logged step."""
    waited: int
    """Microseconds for which the host waited for the device."""


class RankStats:
    """Reads the counters of this rank. Made when training begins: the peak of a GPU counts from here."""

    def __init__(self, session: Session) -> None:
        self.session, self.device = session, session.device
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # those of loading, of the dry step and of initial weights do not count
            self.limit = torch.cuda.get_device_properties(self.device).total_memory
        else:
            self.limit = host_memory() // (local_world_size() or session.parallel.mesh.world)

    def counters(self, waits: Waits) -> Counters:
        """Returns those of this rank. The host does not wait for the device."""
        resident, highest = process_memory()
        times = round(waits.exchange * MILLION), round(waits.device * MILLION)
        if self.device.type != "cuda":
            return Counters(None, None, resident, highest, MILLION * highest // self.limit, None, *times)
        stats = torch.cuda.memory_stats(self.device)
        allocated, reserved = stats.get("allocated_bytes.all.current", 0), stats.get("reserved_bytes.all.current", 0)
        peak, taken = stats.get("allocated_bytes.all.peak", 0), stats.get("reserved_bytes.all.peak", 0)
        retries = stats.get("num_alloc_retries", 0)
        return Counters(allocated, reserved, resident, peak, MILLION * taken // self.limit, retries, *times)

    def over_ranks(self, waits: Waits) -> Tensor:
        """Returns (2, K) int64 on the device: the counters of the worst rank, with its number, and the sums. Collective."""
        mesh = self.session.parallel.mesh
        mine_K = torch.tensor([counter for counter in self.counters(waits) if counter is not None], dtype=torch.int64)
        worst_K, sums_K = on_device(torch.stack([mine_K * RANKS + RANKS - 1 - mesh.rank, mine_K]), self.device).unbind()
        return torch.stack([max_over(worst_K.contiguous(), mesh.everyone), sum_over(sums_K.contiguous(), mesh.everyone)])


def rank_metrics(over_ranks_2K: Tensor, ranks: int, cuda: bool, seconds: float) -> dict[str, Any]:
    """Returns keys of metrics.jsonl. `seconds`: those of training since the last logged step, in which the ranks waited."""
    names = [name for name in Counters._fields if cuda or name not in ("allocated", "reserved", "retries")]
    worst = dict(zip(names, over_ranks_2K[0].tolist(), strict=True))
    total = dict(zip(names, over_ranks_2K[1].tolist(), strict=True))
    record: dict[str, Any] = {}
    for name, key in MEMORY.items():
        if name in worst:
            record |= {key: worst[name] // RANKS / 1e9, f"{key}_mean": total[name] / ranks / 1e9}
    record["system/memory_peak_gb_rank"] = RANKS - 1 - worst["peak"] % RANKS
    record["system/memory_share"] = worst["share"] // RANKS / MILLION
    if cuda:
        record["system/allocation_retries"] = total["retries"]
        record["perf/host_wait_fraction"] = total["waited"] / ranks / MILLION / seconds
    if ranks > 1:
        record["perf/exchange_fraction"] = worst["exchanged"] // RANKS / MILLION / seconds
        record["perf/exchange_fraction_mean"] = total["exchanged"] / ranks / MILLION / seconds
    return record


def process_memory() -> tuple[int, int]:
    """Returns the resident bytes of this process, and the most that they were."""
    try:
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        resident, most = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return resident, max(resident, most)  # Linux counts both in batches
    except (OSError, KeyError, ValueError):  # not Linux: only the most is known
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most, most


def host_memory() -> int:
    """Returns the bytes of the host's memory, or of a container's limit."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no cgroup of version 2, or no limit
        return physical
