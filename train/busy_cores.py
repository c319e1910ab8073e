"""Warns before a run on CPUs if other processes hold its cores: each operator ends with the slowest of its threads."""

import logging
import os
import time
from pathlib import Path

import torch

from .config.environment import local_world_size

STAT = Path("/proc/stat")
SECONDS = 0.1
"""How long the cores are watched; Linux counts in steps of 0.01 s."""
ALLOWED = 0.5
"""Cores that others may use unnoticed."""

log = logging.getLogger("tokenyard")


def warn_of_busy_cores(device: torch.device) -> None:
    """Warns in one line if others use cores that the threads of this host's ranks need. Takes SECONDS.

    What the other threads of this process use is subtracted, for every rank of the host. Silent where there is no /proc/stat.
    """
    if device.type != "cpu" or not STAT.is_file():
        return
    cores, ranks = os.sched_getaffinity(0), local_world_size() or 1
    before, mine = _ticks(cores), time.process_time()
    time.sleep(SECONDS)
    spans = [(idle - before[core][0], total - before[core][1]) for core, (idle, total) in _ticks(cores).items()]
    busy = sum(1 - idle / total for idle, total in spans if total > 0)
    others = busy - ranks * (time.process_time() - mine) / SECONDS
    if others > max(0, len(cores) - ranks * torch.get_num_threads()) + ALLOWED:
        advice = "GOMP_SPINCOUNT=10000 in the environment lets waiting threads sleep"
        log.warning(
            "other processes hold %.1f of %d cores, and each operator waits for its slowest thread; %s", others, len(cores), advice
        )


def _ticks(cores: set[int]) -> dict[int, tuple[int, int]]:
    """Returns the idle ticks and all ticks of each core since the machine started (proc_stat(5))."""
    ticks = {}
    for line in STAT.read_text().splitlines():
        name, *counts = line.split()
        if name[:3] == "cpu" and name[3:] and int(name[3:]) in cores:
            numbers = [int(count) for count in counts[:8]]  # those of guests are in those of users
            ticks[int(name[3:])] = numbers[3] + numbers[4], sum(numbers)
    return ticks
