"""Fault 21: whoever asks a run to stop or to save is heard by all ranks at one step, and gets a durable checkpoint."""

import os
import random
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fault_run import Launched, checkpoint_steps, configured, events_of, losses
from tokenyard.checkpoint.store import read_whole
from tokenyard.train import step as step_module
from tokenyard.train.fault_tolerance.signals import handling_signals
from tokenyard.train.logging.run_logger import build_run_logger
from tokenyard.train.run import train_session
from tokenyard.train.setup import open_session

LONG = ["steps=3000", "checkpoint.every=0"]


def stopped_run(folder: Path, ask: Any, *overrides: str) -> tuple[int, int, float]:
    """Exit code, steps between the request and the end, seconds from the request to the end of the launcher."""
    with Launched(folder, *LONG, *overrides) as run:
        run.until_step(3)
        asked_at, asked = losses(folder)[-1][0], time.monotonic()
        ask(run)
        code = run.wait()
        seconds = time.monotonic() - asked
    steps = [step for step, _ in losses(folder)]
    assert steps == list(range(1, steps[-1] + 1))
    assert checkpoint_steps(folder) == [steps[-1]], run.output()
    assert [event["code"] for event in events_of(folder, "stopped")] == [0]
    assert not (folder / "stop").exists()
    assert read_whole(folder / "checkpoints" / f"step_{steps[-1]:08d}")
    return code, steps[-1] - asked_at, seconds


def to_launcher(number: int) -> Any:
    return lambda run: os.kill(run.process.pid, number)


def to_one_rank(run: Launched) -> None:
    os.kill(run.ranks()[-1], signal.SIGTERM)


def twice_and_during_the_save(run: Launched) -> None:
    for _ in range(40):
        for pid in [run.process.pid, *run.ranks()]:
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                return
        time.sleep(0.02)


def touch_stop(run: Launched) -> None:
    (run.folder / "stop").touch()


WAYS = {
    "SIGTERM to the launcher": to_launcher(signal.SIGTERM),
    "SIGINT to the launcher": to_launcher(signal.SIGINT),
    "SIGUSR2 to the launcher": to_launcher(signal.SIGUSR2),
    "SIGTERM to one rank": to_one_rank,
    "again and again, also during the save": twice_and_during_the_save,
    "touch RUN/stop": touch_stop,
}


def asked_run(folder: Path, rank: int, step: int, number: int) -> tuple[int, int, bool]:
    """A run on ranks of the pool, one of which gets a signal at the begin of `step`: exit code, last step, whether it saved."""
    right = step_module.count_totals

    def count_totals(parallel: Any, rows: Any) -> Any:
        if session.step + 1 == step and parallel.mesh.rank == rank:
            os.kill(os.getpid(), number)
        return right(parallel, rows)

    with handling_signals(), mock.patch.object(step_module, "count_totals", count_totals):
        session = open_session(configured(folder, "steps=40", "checkpoint.every=0", "parallel.expert=2"), torch.device("cpu"))
        with closing(session), build_run_logger(session) as run_logger:
            code = train_session(session, run_logger)
    return code, session.step, session.checkpoint is not None


@pytest.mark.fault(21)
def test_all_ranks_stop_after_the_next_step_in_20_of_20(ranks: Any, tmp_path: Path, record_property: Any) -> None:
    """A flag that is set within a step is told at the end of the next one at the latest."""
    draw, right = random.Random(21), 0
    for trial in range(20):
        rank, step, number = draw.randrange(2), draw.randrange(2, 9), draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
        results = ranks(2, asked_run, tmp_path / str(trial), rank, step, int(number))
        right += len(set(results)) == 1 and results[0][0] == 0 and step <= results[0][1] <= step + 1 and results[0][2]
        assert checkpoint_steps(tmp_path / str(trial)) == [results[0][1]]
    assert right == 20
    record_property("measured", "same step on all ranks, at most one step later, durable: 20/20")


@pytest.mark.fault(21)
@pytest.mark.parametrize("way", WAYS)
def test_a_run_stops_on_request(way: str, tmp_path: Path, record_property: Any) -> None:
    code, _, seconds = stopped_run(tmp_path / "run", WAYS[way])
    assert code == 0
    record_property("measured", f"exit 0, one step on all ranks, {seconds:.1f} s to the end of the launcher ({way})")


@pytest.mark.fault(21)
def test_a_run_saves_on_request_and_goes_on(tmp_path: Path) -> None:
    """SIGUSR1 and `touch RUN/save`, then it is stopped; two more checkpoints than the last one."""
    folder = tmp_path / "run"
    with Launched(folder, *LONG, "checkpoint.keep=9") as run:
        run.until_step(2)
        os.kill(run.process.pid, signal.SIGUSR1)
        run.until(lambda: len(checkpoint_steps(folder)) == 1)
        run.until_step(checkpoint_steps(folder)[-1] + 1)  # a wish before the next step would be granted by this checkpoint
        (folder / "save").touch()
        run.until(lambda: len(checkpoint_steps(folder)) == 2 and not (folder / "save").exists())
        run.until_step(checkpoint_steps(folder)[-1] + 2)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.wait() == 0
    assert len(checkpoint_steps(folder)) == 3


@pytest.mark.fault(21)
def test_one_process_stops_within_a_step(tmp_path: Path) -> None:
    """Asked in the middle of step 4, at its end there is nothing more to do than to save."""
    folder = tmp_path / "run"
    with Launched(folder, *LONG, ranks=1, failpoints="step.begin:step=4:SIGTERM") as run:
        assert run.wait() == 0
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4] and checkpoint_steps(folder) == [4]
