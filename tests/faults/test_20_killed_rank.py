"""Fault 20: after kill -9 of one rank all are started again and go on from the newest checkpoint, as if nothing had happened."""

from pathlib import Path
from typing import Any

import pytest
from checkpoint_run import everything, same_tensors
from fault_run import Launched, events_of, losses
from tokenyard.train.logging.goodput import in_words

STEPS, EVERY = 12, 2
RUN = [f"steps={STEPS}", f"checkpoint.every={EVERY}", "parallel.expert=2", "debug.stragglers_every=0"]


def same_weights(one: Path, other: Path) -> bool:
    """And moments; each process seeds Python's and numpy's generators by itself."""
    ours, theirs = (everything(folder / "checkpoints" / f"step_{STEPS:08d}") for folder in (one, other))
    return same_tensors(ours, theirs)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, which nobody kills."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    with Launched(folder, *RUN) as run:
        assert run.wait() == 0, run.output()
    return folder


@pytest.mark.fault(20)
def test_a_killed_rank_is_started_again(straight: Path, tmp_path: Path, record_property: Any) -> None:
    """kill -9 of one rank before step 8: torch's launcher starts all again, and they go on after 6, or 4 if 6 was being saved."""
    folder = tmp_path / "run"
    with Launched(folder, *RUN, "launch.max_restarts=3", failpoints="step.begin:rank=1:restart=0:step=8:SIGKILL") as run:
        run.until(lambda: len(run.ranks()) == 2)
        before = run.ranks()
        killed = run.until(lambda: before[1] not in run.ranks() or before[0] not in run.ranks())
        seconds = run.until_step(8) - killed
        assert run.wait() == 0, run.output()
    assert losses(folder) == losses(straight)
    assert [event["step"] for event in events_of(folder, "resume")] in ([4], [6])
    assert same_weights(folder, straight)
    (*_, last) = events_of(folder, "accounting")
    assert last["restarts"] == 1 and last["seconds"]["lost"] > 0
    assert seconds <= 15
    record_property("measured", f"bitwise; {seconds:.1f} s from the kill to the next step; {in_words(last)}")
    print(in_words(last))
