"""Faults 43 and 44: the hang guard outlives a clock set back and a folder that takes no note; ranks end with their launcher."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fault_run import Launched, events_of
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import build_mesh
from tokenyard.parallel.progress import PROGRESS, collective, in_phase
from tokenyard.train import run as run_module
from tokenyard.train.config.config import ConfigError
from tokenyard.train.exit import STACKS, Failure, leave_note
from tokenyard.train.fault_tolerance import processes, watchdog
from tokenyard.train.fault_tolerance.hang_diagnosis import HangDiagnosis
from tokenyard.train.fault_tolerance.watchdog import Watchdog
from tokenyard.train.run_folder import NAME, lock_run

TIMEOUT = 0.5


def hang(folder: Path, clock: float, start: str) -> HangDiagnosis:
    """What rank 0, which waits, and rank 1, which sleeps, say; the clock on the wall is set back by so many seconds meanwhile."""
    everyone, verdicts, now = build_mesh(ParallelConfig()).everyone, [], time.time
    PROGRESS.__init__()
    PROGRESS.step = 7
    dist.barrier()
    dog = Watchdog(folder, everyone.rank, everyone.size, TIMEOUT, on_end=verdicts.append, start_id=start).start()
    with mock.patch.object(time, "time", lambda: now() - clock), in_phase("forward"):
        if everyone.rank == 1:
            deadline = time.monotonic() + 30
            while not verdicts and time.monotonic() < deadline:
                time.sleep(0.02)
        with collective("all_reduce", everyone):
            dist.all_reduce(torch.ones(3))
    dog.thread.join(10)
    return verdicts[0] if verdicts else HangDiagnosis([], "nothing was said")


@pytest.mark.fault(43, "a clock set back an hour, a RUN/stacks that cannot be made: the right rank named all the same")
@pytest.mark.parametrize("kind", ["the clock is set back", "no note can be written"])
def test_the_guard_survives(kind: str, ranks: Any, tmp_path: Path) -> None:
    if kind == "no note can be written":
        (tmp_path / STACKS).write_text("in the way")
    verdicts = ranks(2, hang, tmp_path, 3600.0 if "clock" in kind else 0.0, os.urandom(8).hex())
    assert [verdict.ranks for verdict in verdicts] == [[1], [1]], verdicts
    assert verdicts[0].text.startswith("hang: rank 1 (step 7, ")


def test_trackers_end_where_another_rank_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the code of that rank, before the process does."""
    seen: list[Any] = []
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(os, "_exit", lambda code: seen.append(("exit", code)))
    leave_note(tmp_path, Failure(1, 3, "OSError: gone", 1))
    dog = Watchdog(tmp_path, 0, 2, TIMEOUT, on_failure=lambda code: seen.append(("trackers", code))).start()
    dog.thread.join(10)
    assert seen == [("trackers", 1), ("exit", 1)]


def test_a_run_gives_its_trackers_to_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(run_module, "hang_guard", lambda *arguments: given.append(arguments) or nullcontext())
    for name in ("build_supervisor", "check_before_collectives", "dry_step", "train"):
        monkeypatch.setattr(run_module, name, mock.Mock())
    run_logger = mock.Mock()
    assert run_module.train_session(mock.Mock(), run_logger) == 0
    assert given[0][1:] == (run_logger.on_hang, run_logger.on_rank_failure)


@pytest.mark.fault(43)
def test_a_stopped_rank_is_named_and_the_launcher_ends_soon(tmp_path: Path, record_property: Any) -> None:
    folder = tmp_path / "run"
    with Launched(folder, "steps=100000", "parallel.timeout_seconds=5", "parallel.expert=2") as run:
        run.until_step(3, 300)
        begin, frozen = time.monotonic(), run.ranks()[1]
        os.kill(frozen, signal.SIGSTOP)
        assert run.wait(120) == 69, run.output()
        seconds = time.monotonic() - begin
    [event] = events_of(folder, "hang")
    assert len(event["ranks"]) == 1 and seconds <= 15
    record_property("measured", f"SIGSTOP: exit 69, {seconds - 5:.1f} s after the timeout, the launcher included")


@pytest.mark.fault(44)
def test_ranks_end_with_their_launcher(tmp_path: Path, record_property: Any) -> None:
    folder = tmp_path / "run"
    with Launched(folder, "steps=100000", "parallel.expert=2") as run:
        run.until_step(3, 300)
        ranks = run.ranks()
        os.kill(run.process.pid, signal.SIGKILL)
        begin = time.monotonic()
        while any(Path(f"/proc/{pid}/stat").exists() and _state(pid) != "Z" for pid in ranks):
            assert time.monotonic() - begin < 10
            time.sleep(0.02)
    record_property("measured", f"kill -9 of the launcher: its ranks ended {time.monotonic() - begin:.1f} s later")


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.fault(44)
def test_a_refusal_names_the_process_that_lives(tmp_path: Path) -> None:
    """The owner has ended, and a process that it started has its lock."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    descriptor = os.open(tmp_path / NAME, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, json.dumps({"host": socket.gethostname(), "pid": gone.pid}).encode())
    heir = subprocess.Popen(["sleep", "60"], pass_fds=[descriptor])
    os.close(descriptor)
    try:
        with pytest.raises(ConfigError, match=f"process {gone.pid} on .*which has ended; its lock is held by process {heir.pid};"):
            lock_run(tmp_path)
    finally:
        heir.kill()
        heir.wait()


@pytest.mark.fault(44)
def test_a_rank_whose_launcher_is_gone_ends_at_once() -> None:
    """It died before the system was asked to say so."""
    with (
        mock.patch.dict(os.environ, {"TORCHELASTIC_RUN_ID": "x", processes.LAUNCHER: "1000000000"}),
        mock.patch.object(processes.ctypes, "CDLL") as system,
        mock.patch.object(processes.os, "kill") as kill,
    ):
        processes.end_with_launcher()
        assert system.return_value.prctl.call_args.args == (processes.PR_SET_PDEATHSIG, signal.SIGKILL)
        kill.assert_called_once_with(os.getpid(), signal.SIGKILL)
