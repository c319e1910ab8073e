"""`tokenyard train` on a few ranks that are forked from one process with torch in it: a start costs no import.

`forked(2, ["steps=4", ...], log)` ends all ranks when one has failed, as launchers do.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

GRACE_SECONDS = 1.0
PRELOADED = [
    "tokenyard.train.run",
    "tokenyard.train.logging.run_logger",
    "tokenyard.train.config.compose",
    "hydra",
    "torch._dynamo",
]
"""The last is what torch's optimizers import when the first is made."""


class Ended(NamedTuple):
    """Exit codes by rank (minus a signal's number) and what all ranks printed."""

    codes: list[int]
    output: str


def forked(world: int, words: list[str], log: Path, *, limit: float = 60.0, **environment: str) -> Ended:
    """AssertionError, with the output, if it takes longer than `limit` seconds. `environment` is added to this process's."""
    started = start(world, words, log, **environment)
    with ending(started):
        wait(started, limit, log)
    return Ended([process.exitcode or 0 for process in started], log.read_text(errors="replace"))


def start(world: int, words: list[str], log: Path, **environment: str) -> list[ForkServerProcess]:
    """Ranks that run."""
    return start_each(world, words, log, [environment] * world)


def start_each(world: int, words: list[str], log: Path, environments: list[dict[str, str]]) -> list[ForkServerProcess]:
    """The same, with an environment for each rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    shared = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    own = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **shared}
    started = [
        context.Process(target=_rank, args=(rank, own | environment, words, log)) for rank, environment in enumerate(environments)
    ]
    for process in started:
        process.start()
    return started


@contextlib.contextmanager
def ending(started: list[ForkServerProcess]) -> Any:
    """Whatever happens inside, no rank is left."""
    try:
        yield
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, signal.SIGKILL) if process.is_alive() else None
            process.join(5)


def wait(started: list[ForkServerProcess], limit: float, log: Path) -> None:
    """Until all have ended, or a moment after the first that failed."""
    deadline = time.monotonic() + limit
    while any(process.is_alive() for process in started):
        if any(process.exitcode not in (None, 0) for process in started):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            for process in started:
                process.join(max(0.0, deadline - time.monotonic()))
            return
        assert time.monotonic() < deadline, f"still running after {limit:g} s\n{log.read_text(errors='replace')}"
        time.sleep(0.01)


def _rank(rank: int, environment: dict[str, str], words: list[str], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    import torch
    from tokenyard.train.rank_command import run_rank

    torch.set_num_threads(1)
    code = run_rank(words)
    sys.stdout.flush()
    os._exit(code)


def free_port() -> int:
    """Nobody listens there at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
