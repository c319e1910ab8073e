"""A run folder belongs to one job; another model is refused in it, another learning rate is taken and said."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from checkpoint_run import configured, events_of, words
from forked_runs import ending, forked, start
from tokenyard.train.run import run
from tokenyard.train.run_folder import NAME, lock_run


@pytest.mark.fault(8)
def test_the_second_job_is_refused_and_a_dead_one_succeeded(tmp_path: Path, record_property) -> None:
    folder = tmp_path / "run"
    line = words(folder, "steps=100000", "checkpoint.every=5")
    with ending(start(1, line, tmp_path / "first")) as _:
        first = json.loads(until(folder / NAME))
        until(folder / "checkpoints" / "step_00000005" / "manifest.json")
        begin = time.monotonic()
        second = forked(2, line, tmp_path / "second")
        seconds = time.monotonic() - begin
        assert second.codes == [2, 2], second.output
        assert f"is in use by process {first['pid']} on {first['host']} since" in second.output
        assert second.output.count("tokenyard: ") == 1
        os.kill(first["pid"], signal.SIGKILL)
    third = forked(1, words(folder, "steps=8", "checkpoint.every=4"), tmp_path / "third")
    assert third.codes in ([0], [2]), third.output
    [taken] = events_of(folder, "lock_taken_over")
    assert f"process {first['pid']} on" in taken["owner"] and not (folder / NAME).exists()
    record_property(
        "measured", f"second job: exit 2 on both ranks after {seconds:.1f} s, owner and pid named; killed owner: taken over"
    )


def until(path: Path, seconds: float = 60.0) -> str:
    """The content of a file that another process writes."""
    deadline = time.monotonic() + seconds
    while not path.is_file() or not path.read_text():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)
    return path.read_text()


@pytest.mark.fault(8)
def test_a_lock_ends_with_its_owner_and_is_reentrant_in_a_process(tmp_path: Path) -> None:
    lock = lock_run(tmp_path)
    lock_run(tmp_path).release()
    lock.release()
    assert not (tmp_path / NAME).exists()
    (tmp_path / NAME).write_text("not JSON")
    assert lock_run(tmp_path).previous is None


@pytest.mark.fault(8)
def test_another_learning_rate_is_taken_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, record_property) -> None:
    folder = tmp_path / "run"
    assert run(configured(folder)) == 0
    caplog.clear()
    with caplog.at_level("WARNING", logger="tokenyard"):
        assert run(configured(folder, "optimizer.lr=0.001", "steps=8")) == 0
        assert run(configured(folder, "optimizer.lr=0.001", "steps=8", "model.moe.top_k=1")) == 2
    [changed] = events_of(folder, "settings_changed")
    assert changed["changed"] == {"steps": {"before": 6, "now": 8}, "optimizer.lr": {"before": 0.005, "now": 0.001}}
    record_property("measured", "changed model: exit 2; changed learning rate: taken, the change printed and in events.jsonl")
