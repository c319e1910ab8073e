"""Processes of this machine that a benchmark starts itself, as gloo ranks or alone: each runs a module and answers with JSON."""

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

from ..train.allocator import SETTINGS


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
    """On a rank: join the group, if there are others, and read the task."""
    rank, world, threads = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"))
    torch.set_num_threads(threads)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    return json.loads((folder / "task.json").read_text())


def answer(folder: Path, result: Any) -> None:
    """On a rank: hand back the result, and leave the group."""
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


class Side:
    """`world` processes that run `python -m MODULE --rank FOLDER` and answer lines of JSON with such lines. They sleep in between.

    One has said that it is ready before this returns. Use it in a `with` statement. RuntimeError if one has ended.
    """

    def __init__(self, module: str, world: int, threads: int, task: dict[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tokenyard-bench-")
        folder = Path(self._folder.name)
        (folder / "task.json").write_text(json.dumps(task | {"folder": str(folder)}))
        self._processes = [_start(module, folder, rank, world, threads, subprocess.PIPE) for rank in range(world)]
        self._read()

    def ask(self, call: dict[str, Any]) -> list[Any]:
        """The answers of all processes, by rank."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(call).encode() + b"\n")
            process.stdin.flush()
        return self._read()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()
        self._folder.cleanup()

    def _read(self) -> list[Any]:
        answers = []
        for rank, process in enumerate(self._processes):
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                self.__exit__()
                raise RuntimeError(f"rank {rank} of {len(self._processes)} has ended with code {process.returncode}")
            answers.append(json.loads(line))
        return answers


def _start(
    module: str, folder: Path, rank: int, world: int, threads: int = 1, pipe: int | None = None
) -> "subprocess.Popen[bytes]":
    """With the memory settings of the command `tokenyard`."""
    settings = SETTINGS | {"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": str(threads)}
    interface = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, "-m", module, "--rank", str(folder)]
    return subprocess.Popen(words, env=os.environ | interface | settings | paths, stdin=pipe, stdout=pipe)


def _wait(processes: list["subprocess.Popen[bytes]"], deadline: float) -> None:
    while any(process.poll() is None for process in processes):
        if failed := [rank for rank, process in enumerate(processes) if process.poll()]:
            raise RuntimeError(f"rank {failed[0]} ended with code {processes[failed[0]].returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError("the ranks are not done in time")
        time.sleep(0.05)
