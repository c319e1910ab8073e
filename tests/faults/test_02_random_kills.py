"""Killed at random instants again and again, a run goes on by the same command, bit for bit as if nothing had happened."""

import os
import random
import signal
import time
from collections import Counter
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from checkpoint_run import everything, losses, same_tensors, steps_in, words
from fault_run import records
from forked_runs import ending, forked, start

STEPS, EVERY = 30, 5
RUN = [f"steps={STEPS}", f"checkpoint.every={EVERY}", "parallel.expert=2", "debug.dry_step=false"]
KILLS = int(os.environ.get("TOKENYARD_KILLS", "10"))
"""make faults-full sets 200."""
KILLS_OF_A_RUN = 8
"""After so many a run is let to its end; run number n draws from the seed n."""


@pytest.mark.fault(2)
@pytest.mark.timeout(7200)
def test_killed_at_random_instants(tmp_path: Path, record_property: Any) -> None:
    """Both ranks, in drawn order, at drawn instants from the start of the processes to the end of the run."""
    begin = time.monotonic()
    assert forked(2, words(tmp_path / "straight", *RUN), tmp_path / "log").codes == [0, 0]
    seconds, runs, lost, places = time.monotonic() - begin, 0, [0], Counter[str]()
    while places.total() < KILLS:
        folder, draw, before = tmp_path / str(runs), random.Random(runs), places.total()
        while places.total() < min(KILLS, before + KILLS_OF_A_RUN) and (place := killed(folder, draw, seconds)):
            places[place] += 1
            lost.append(lost_steps(folder))
        again = forked(2, words(folder, *RUN), tmp_path / "log", limit=600.0)
        assert again.codes == [0, 0], again.output
        assert losses(folder) == losses(tmp_path / "straight")
        ours, theirs = (everything(each / "checkpoints" / f"step_{STEPS:08d}") for each in (folder, tmp_path / "straight"))
        assert same_tensors(ours, theirs)
        runs += 1
    text = f"{places.total()}/{KILLS} kills ({', '.join(f'{places[place]} {place}' for place in sorted(places))})"
    text += f", {runs} runs to their end (seeds 0 to {runs - 1}), all bitwise the straight one"
    record_property("measured", f"{text}; at most {max(lost)} steps done again, checkpoints every {EVERY}")


def killed(folder: Path, draw: random.Random, seconds: float) -> str | None:
    """Start the run, or go on with it, and kill it within so many seconds: in what; None if it ended before that."""
    before = saves(folder)
    started = start(2, words(folder, *RUN), folder.parent / "log")
    with ending(started):
        wait_until_ended(started, draw.uniform(0.05, 1.0) * seconds)
        if all(process.exitcode is not None for process in started):
            assert [process.exitcode for process in started] == [0, 0], (folder.parent / "log").read_text()
            return None
        for process in draw.sample(started, 2):
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL)
            time.sleep(draw.uniform(0.0, 0.05))
    if "\nstep " not in (folder.parent / "log").read_text(errors="replace"):
        return "before a step"
    return "in a save" if saves(folder) - before else "in a step"


def saves(folder: Path) -> set[str]:
    """That are under way, or were."""
    return {path.name for path in (folder / "checkpoints").glob("*.tmp-*")}


def wait_until_ended(started: list[ForkServerProcess], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))


def lost_steps(folder: Path) -> int:
    """That the next start does again: at most an interval, and one more if the save of its begin was still under way."""
    steps = [record["step"] for record in records(folder)]
    assert steps == list(range(1, len(steps) + 1)), "a step is missing or there twice"
    durable = max([0, *steps_in(folder)])
    assert len(steps) - durable <= 2 * EVERY
    return max(0, len(steps) - durable)
