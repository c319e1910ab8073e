"""Faults 2 and 20: killed at any instant, a run goes on from its newest checkpoint, bit for bit as if nothing had happened."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_run import Launched, checkpoint_steps, events_of, losses, records
from tokenyard.train.checkpoint.store import read_whole

STEPS, EVERY = 12, 2
RUN = [f"steps={STEPS}", f"checkpoint.every={EVERY}", "parallel.expert=2", "debug.stragglers_every=0"]
KILLS = int(os.environ.get("TOKENYARD_KILLS", "6"))
"""Of fault 2; make faults-full sets 200."""
TURNS = 8
"""Kills of one run before it is let through to its end."""


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (read_whole(folder / "checkpoints" / f"step_{STEPS:08d}", "") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, which nobody kills."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    with Launched(folder, *RUN) as run:
        assert run.wait() == 0, run.output()
    return folder


@pytest.mark.fault(20)
def test_a_killed_rank_is_started_again(straight: Path, tmp_path: Path, record_property: Any) -> None:
    """kill -9 of one rank before step 8: torch's launcher starts all again, and they go on after step 6."""
    folder = tmp_path / "run"
    with Launched(folder, *RUN, "launch.max_restarts=3", failpoints="step.begin:rank=1:restart=0:step=8:SIGKILL") as run:
        run.until(lambda: len(run.ranks()) == 2)
        before = run.ranks()
        killed = run.until(lambda: before[1] not in run.ranks() or before[0] not in run.ranks())
        seconds = run.until_step(8) - killed
        assert run.wait() == 0, run.output()
    assert losses(folder) == losses(straight)
    assert [event["step"] for event in events_of(folder, "resume")] == [6]
    assert same_weights(folder, straight)
    (*_, last) = events_of(folder, "accounting")
    assert last["restarts"] == 1 and last["seconds"]["lost"] > 0
    assert seconds <= 15
    record_property("measured", f"bitwise; {seconds:.1f} s from the kill to the next step; productive {last['productive']:.0%}")


@pytest.mark.fault(2)
@pytest.mark.timeout(3600)
def test_killed_at_random_instants(straight: Path, tmp_path: Path, record_property: Any) -> None:
    """All ranks and the launcher at once, at a seeded instant; started again by the same command. At most one interval is lost."""
    draw, usable, trial = random.Random(2), 0, 0
    while trial < KILLS:
        folder, reached = tmp_path / str(trial), 0
        for _ in range(min(TURNS, KILLS - trial)):
            with Launched(folder, *RUN) as run:
                begin = time.monotonic()
                instant = draw.uniform(2.0, 8.0)
                while time.monotonic() - begin < instant and run.process.poll() is None:
                    time.sleep(0.005)
                for pid in [run.process.pid, *run.ranks()]:
                    _kill(pid)
            steps = [record["step"] for record in records(folder)]
            assert steps == list(range(1, len(steps) + 1)), "a step is missing or there twice"
            reached = max([reached, *steps])
            assert max([0, *checkpoint_steps(folder)]) >= reached - reached % EVERY - EVERY
            usable, trial = usable + 1, trial + 1
        with Launched(folder, *RUN) as run:
            assert run.wait() == 0, run.output()
        assert losses(folder) == losses(straight) and same_weights(folder, straight)
    record_property("measured", f"{usable}/{KILLS} restarts went on, seed 2, at most one interval of {EVERY} steps lost")


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
