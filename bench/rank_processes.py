"""Processes that a benchmark starts on this machine, as gloo ranks or alone. Each runs a module and answers with JSON."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..train.allocator import SETTINGS


class JsonWorker:
    """A process `python -m WORDS` that answers each line of JSON with a line of JSON, and sleeps in between.

    `environment` is added to that of this process. `name` is for messages.
    """

    def __init__(self, name: str, words: list[str], environment: Mapping[str, str]) -> None:
        self.name, self._stderr = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=os.environ | environment,
            text=True,
            bufsize=1,
        )

    def ask(self, call: Any) -> None:
        """Sends a request. Does not wait."""
        assert self._process.stdin is not None
        print(json.dumps(call), file=self._process.stdin, flush=True)

    def answer(self) -> Any:
        """Waits for the next answer. Raises RuntimeError, with the last line of its standard error, if the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._stderr.seek(0)
        words = self._stderr.read().strip().splitlines() or ["nothing"]
        raise RuntimeError(f"{self.name} ended with code {self._process.wait()} and said: {words[-1]}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            assert stream is not None
            stream.close()


LIMIT_SECONDS = 600.0
"""Time limit of a task."""


def on_ranks(module: str, world: int, task: dict[str, Any]) -> list[Any]:
    """Runs `python -m MODULE --rank FOLDER` on `world` ranks. Returns what each gave to `answer`.

    Raises RuntimeError if one fails or takes more than LIMIT_SECONDS.
    """
    with tempfile.TemporaryDirectory(prefix="tokenyard-bench-") as name:
        folder = Path(name)
        (folder / "task.json").write_text(json.dumps(task))
        words = [sys.executable, "-m", module, "--rank", str(folder)]
        processes = [subprocess.Popen(words, env=os.environ | _environment(rank, world, 1)) for rank in range(world)]
        try:
            _wait(processes, time.monotonic() + LIMIT_SECONDS)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def join(folder: Path) -> dict[str, Any]:
    """Joins the process group, if there are other ranks, and returns the task. For a rank."""
    rank, world, threads = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"))
    torch.set_num_threads(threads)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    return json.loads((folder / "task.json").read_text())


def answer(folder: Path, result: Any) -> None:
    """Returns the result to the parent, and leaves the process group. For a rank."""
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


class RankProcesses:
    """`world` processes that run `python -m MODULE --rank FOLDER` and answer lines of JSON, as `JsonWorker`.

    The constructor returns when all of them are ready. Use it in a `with` statement. Raises RuntimeError if one has ended.
    """

    def __init__(self, module: str, world: int, threads: int, task: dict[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tokenyard-bench-")
        folder = Path(self._folder.name)
        (folder / "task.json").write_text(json.dumps(task | {"folder": str(folder)}))
        words = [module, "--rank", str(folder)]
        self._ranks = [JsonWorker(f"rank {rank} of {world}", words, _environment(rank, world, threads)) for rank in range(world)]
        self._answers()

    def ask(self, call: dict[str, Any]) -> list[Any]:
        """Returns the answers of all processes, by rank."""
        for rank in self._ranks:
            rank.ask(call)
        return self._answers()

    def __enter__(self) -> "RankProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            rank.close()
        self._folder.cleanup()

    def _answers(self) -> list[Any]:
        try:
            return [rank.answer() for rank in self._ranks]
        except RuntimeError:
            self.__exit__()
            raise


def _environment(rank: int, world: int, threads: int) -> dict[str, str]:
    """Returns the environment of a rank, with the memory settings of the command `tokenyard`."""
    settings = SETTINGS | {"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": str(threads)}
    interface = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return settings | interface | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _wait(processes: list["subprocess.Popen[bytes]"], deadline: float) -> None:
    while any(process.poll() is None for process in processes):
        if failed := [rank for rank, process in enumerate(processes) if process.poll()]:
            raise RuntimeError(f"rank {failed[0]} ended with code {processes[failed[0]].returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError("the ranks did not finish in time")
        time.sleep(0.05)
