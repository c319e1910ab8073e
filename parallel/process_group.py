"""Starts and ends the default process group: its ranks come from the environment, its backend from the device."""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from .meeting import meet
from .progress import PROGRESS, waiting
from .streams import enter_thread


def pick_device(name: str) -> torch.device:
    """Returns the device `name`; `auto` is this rank's GPU if there is one, else the CPU. Raises ValueError without the GPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    rank, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if not torch.cuda.is_available():
        why = "torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        raise ValueError(f"device={name}: {why} here; nearest valid: device=cpu")
    if rank >= found:
        raise ValueError(
            f"launch.ranks={rank + 1}: this host has {found} GPUs, one for each rank; nearest valid: launch.ranks={found}"
        )
    return torch.device("cuda", rank)


def join(
    device: torch.device, timeout_seconds: float, job: str = "", say: Callable[[str], None] = print, limit_seconds: float = 600.0
) -> None:
    """Starts the process group if the environment names more than one rank. Raises CannotMeet if they are not there in time.

    `timeout_seconds`: of collectives; `limit_seconds`, `job`, `say`: see `meet`.
    """
    enter_thread(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        store, place = meet(limit_seconds, job, say)
        store.set_timeout(timedelta(seconds=timeout_seconds))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.world,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )


def leave() -> None:
    """Ends the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Waits for all ranks, in a barrier."""
    if dist.is_initialized():
        PROGRESS.number += 1
        with waiting("barrier of all ranks"):
            dist.barrier()


def is_first() -> bool:
    """Whether this is rank 0, which alone prints and writes the run folder."""
    return not dist.is_initialized() or dist.get_rank() == 0
