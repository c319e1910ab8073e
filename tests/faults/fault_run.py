"""The tiny run of the fault tests, and what they look at afterwards; tests/conftest.py puts this folder on the path."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny_run import TINY_RUN
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.session import Session

FAULT_RUN = [
    *TINY_RUN,
    "steps=8",
    "schedule=constant",
    "evaluate.every=0",
    "evaluate.sequences=8",
    "checkpoint.every=3",
    "sample.prompt=",
    "debug.dry_step=false",
]


def configured(folder: Path, *overrides: str) -> Config:
    """Its configuration, for a run in this process."""
    return compose([*FAULT_RUN, f"run.dir={folder}", f"data.cache={folder.parent / 'cache'}", *overrides])


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_journal(folder / "metrics.jsonl")]


def checkpoint_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step_????????"))


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_journal(folder / "events.jsonl") if event["event"] == kind]


def state_of(session: Session) -> dict[str, torch.Tensor]:
    """Copies of this rank's weights and moments, by name."""
    return {name: tensor.clone() for name, (_, tensor) in session.engine.state_to_save().items()}


@contextmanager
def heard() -> Iterator[list[str]]:
    """What the package's logger says inside of the block, wherever else that goes."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("tokenyard")
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)


class Launched:
    """`tokenyard train launch=torchrun` (or python -m MODULE) as a process group of its own, ended with the block."""

    def __init__(
        self, folder: Path, *overrides: str, ranks: int = 2, failpoints: str = "", tiny: bool = True, **environment: str
    ) -> None:
        """The tiny run, else the default one."""
        self.folder = folder
        words = [*FAULT_RUN, f"data.cache={folder.parent / 'cache'}"] if tiny else []
        words += [f"run.dir={folder}", *overrides]
        words += ["launch=torchrun", f"launch.ranks={ranks}"] if ranks > 1 else []
        own = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TOKENYARD_FAILPOINTS": failpoints, **environment}
        own["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        own["PYTHONUNBUFFERED"] = "1"
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.log = folder.parent / f"{folder.name}.log"
        with self.log.open("ab") as log:
            command = [sys.executable, "-P", "-m", "tokenyard", "train", *words]
            self.process = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log, start_new_session=True)

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [*self.ranks(), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def ranks(self) -> list[int]:
        """The processes of the ranks that the launcher started; itself without any."""
        return children(self.process.pid) or [self.process.pid]

    def until(self, holds: Callable[[], bool], seconds: float = 90.0) -> float:
        """Wait until it holds; the time at which it did."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, self.output()
            assert self.process.poll() is None, self.output()
            time.sleep(0.01)
        return time.monotonic()

    def until_step(self, step: int, seconds: float = 90.0) -> float:
        """Wait until metrics.jsonl has the step."""
        return self.until(lambda: any(int(record["step"]) >= step for record in records(self.folder)), seconds)

    def wait(self, seconds: float = 90.0) -> int:
        """The exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:g} s\n{self.output()}") from None

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, which may be written at this moment."""
    try:
        return read_journal(folder / "metrics.jsonl")
    except (OSError, ValueError):
        return []


def children(pid: int) -> list[int]:
    """The processes that this one started and that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[1]) == pid and after_name[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def rows_in(folder: Path) -> str:
    """An override: a new folder of rows that differ."""
    folder.mkdir()
    for shard in range(3):
        lines = [json.dumps({"text": f"shard {shard} row {row} " + "x" * (row % 11)}) for row in range(100)]
        (folder / f"{shard}.jsonl").write_text("\n".join(lines))
    return f"data.path={folder}"
