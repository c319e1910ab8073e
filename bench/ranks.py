"""Gloo ranks of this machine that a benchmark starts itself: each runs the benchmark's module again and answers with JSON."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(module: str, world: int, task: dict[str, Any], seconds: float = 600.0) -> list[Any]:
    """What `python -m MODULE --rank FOLDER` on each of `world` ranks hands to `answer`. RuntimeError if one fails or is late."""
    with tempfile.TemporaryDirectory(prefix="tokenyard-bench-") as name:
        folder = Path(name)
        (folder / "task.json").write_text(json.dumps(task))
        processes = [_start(module, folder, rank, world) for rank in range(world)]
        try:
            _wait(processes, time.monotonic() + seconds)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def join(folder: Path) -> dict[str, Any]:
    """On a rank: join the group and read the task."""
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    return json.loads((folder / "task.json").read_text())


def answer(folder: Path, result: Any) -> None:
    """On a rank: hand back the result, and leave the group."""
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _start(module: str, folder: Path, rank: int, world: int) -> "subprocess.Popen[bytes]":
    settings = {"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    interface = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return subprocess.Popen([sys.executable, "-m", module, "--rank", str(folder)], env=os.environ | interface | settings)


def _wait(processes: list["subprocess.Popen[bytes]"], deadline: float) -> None:
    while any(process.poll() is None for process in processes):
        if failed := [rank for rank, process in enumerate(processes) if process.poll()]:
            raise RuntimeError(f"rank {failed[0]} ended with code {processes[failed[0]].returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError("the ranks are not done in time")
        time.sleep(0.05)
