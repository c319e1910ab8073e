"""Gloo ranks on this machine, started once and used for layouts of any size, several at the same time if they fit."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

WORKER = ["-m", f"{__package__}.rank_worker"]
START_SECONDS, GRACE_SECONDS = 180.0, 3.0
"""Time to import torch on a busy machine, and time for the other ranks of a layout after one has failed."""


class RankCall(NamedTuple):
    """A call that `world` ranks answer together within `limit` seconds."""

    name: str
    world: int
    call: dict[str, Any]
    limit: float


class Done(NamedTuple):
    """The answers by rank, or an `error`."""

    job: RankCall
    seconds: float
    answers: list[dict[str, Any]]
    error: str = ""


@dataclass
class Running:
    """A job that runs on these ranks."""

    job: RankCall
    ranks: list[int]
    started: float
    deadline: float
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        return [rank for rank in self.ranks if rank not in self.answers]


class Ranks:
    """`count` processes and their temporary folder. Use it in a `with` statement."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._folder = tempfile.TemporaryDirectory(prefix="tokenyard-parity-")
        self._processes: list[subprocess.Popen[str]] = []
        self._meetings = 0

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._folder.cleanup()

    def run(self, jobs: list[RankCall]) -> Iterator[Done]:
        """Yields the jobs as they finish; they start in order. After a failed job all ranks are replaced."""
        waiting, running, free = list(jobs), list[Running](), set(range(self.count))
        while waiting or running:
            if not self._processes:
                self._start()
            while waiting and waiting[0].world <= len(free) and not (running and running[0].job.world != waiting[0].world):
                job = waiting.pop(0)
                ranks = sorted(free)[: job.world]
                free -= set(ranks)
                running.append(self._begin(job, ranks))
            done, running = self._wait(running)
            if any(each.error for each in done):
                # Ranks that stopped at different places are not reusable; the other running jobs start again.
                self._end()
                waiting[:0] = [each.job for each in running]
                running, free = [], set(range(self.count))
            else:
                free = set(range(self.count)) - {rank for each in running for rank in each.ranks}
            yield from done

    def _start(self) -> None:
        settings = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        for rank in range(self.count):
            with self._log(rank).open("w") as log:
                command = [sys.executable, "-P", *WORKER, str(rank), self._folder.name]
                pipe = subprocess.PIPE
                self._processes.append(subprocess.Popen(command, env=settings, stdin=pipe, stdout=pipe, stderr=log, text=True))
        deadline = time.monotonic() + START_SECONDS
        for rank in range(self.count):
            if not self._readable([rank], deadline - time.monotonic()) or not self._line(rank).get("ready"):
                raise RuntimeError(f"rank {rank} did not start:\n{self._log(rank).read_text()[-2000:]}")

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self._processes = []

    def _begin(self, job: RankCall, ranks: list[int]) -> Running:
        self._meetings += 1
        meeting = str(Path(self._folder.name) / f"meeting_{self._meetings}")
        for place, rank in enumerate(ranks):
            pipe = self._processes[rank].stdin
            assert pipe is not None
            with contextlib.suppress(OSError):  # a rank that has died is reported when its answer is read
                pipe.write(json.dumps({"rank": place, "world": job.world, "meeting": meeting, **job.call}) + "\n")
                pipe.flush()
        now = time.monotonic()
        return Running(job, ranks, now, now + job.limit)

    def _wait(self, running: list[Running]) -> tuple[list[Done], list[Running]]:
        """Waits until a job is done or late. Returns the ended jobs and the running ones."""
        while True:
            first = min(each.deadline for each in running)
            for rank in self._readable([rank for each in running for rank in each.missing], first - time.monotonic()):
                each = next(each for each in running if rank in each.ranks)
                each.answers[rank] = self._line(rank)
                if "error" in each.answers[rank]:
                    each.deadline = min(each.deadline, time.monotonic() + GRACE_SECONDS)
            now = time.monotonic()
            ended = [each for each in running if not each.missing or each.deadline <= now]
            if ended:
                return [_done(each) for each in ended], [each for each in running if each not in ended]

    def _readable(self, ranks: list[int], seconds: float) -> list[int]:
        with selectors.DefaultSelector() as selector:
            for rank in ranks:
                pipe = self._processes[rank].stdout
                assert pipe is not None
                selector.register(pipe, selectors.EVENT_READ, rank)
            return [key.data for key, _ in selector.select(max(0.0, seconds))]

    def _line(self, rank: int) -> dict[str, Any]:
        pipe = self._processes[rank].stdout
        assert pipe is not None
        line = pipe.readline()
        if line:
            return json.loads(line)
        code = self._processes[rank].wait()
        return {"error": f"died with exit code {code}. {' '.join(self._log(rank).read_text().split())[-200:]}"}

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank_{rank}.log"


def _done(running: Running) -> Done:
    answers = [running.answers.get(rank, {}) for rank in running.ranks]
    failed = [(rank, answer) for rank, answer in running.answers.items() if "error" in answer]  # as they came
    errors = [f"rank {running.ranks.index(rank)}: {answer['error']}" for rank, answer in failed]
    if not errors and running.missing:
        late = ", ".join(str(running.ranks.index(rank)) for rank in running.missing)
        errors = [f"no answer from rank {late} within {running.job.limit:g} s"]
    return Done(running.job, time.monotonic() - running.started, answers, errors[0] if errors else "")
