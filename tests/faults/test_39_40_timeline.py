"""Faults 39 and 40: a run that goes back in its own folder keeps what it writes; one that is started again keeps its progress."""

from pathlib import Path

import pytest
from checkpoint_run import configured, events_of, losses, steps_in
from fault_run import heard
from tokenyard.checkpoint.folder import checkpoints_in
from tokenyard.checkpoint.retention import Retention
from tokenyard.checkpoint.store import save_checkpoint
from tokenyard.train.preflight import check_resume
from tokenyard.train.run import run

LONG = ["steps=12", "checkpoint.every=2", "checkpoint.keep=9"]


def at(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}"


@pytest.mark.fault(
    39, "back from step 12 to 4: 6 to 12 set aside in a folder with the date; the new checkpoints stay, and auto goes on from them"
)
def test_a_rewind_keeps_what_it_writes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(configured(folder, *LONG)) == 0
    back = [f"checkpoint.resume={at(folder, 4)}", "steps=8", "checkpoint.keep=2", "checkpoint.every=2"]
    with heard() as lines:
        assert run(configured(folder, *back)) == 0
    assert steps_in(folder) == [6, 8] and sorted(losses(folder)) == [1, 2, 3, 4, 5, 6, 7, 8]
    [event] = events_of(folder, "set_aside")
    aside = Path(event["path"])
    assert aside.parent == folder / "checkpoints" and aside.name.startswith("set_aside_2")
    assert [path.name for path in checkpoints_in(aside)] == [f"step_{step:08d}" for step in (12, 10, 8, 6)]
    assert sum("set aside in" in line for line in lines) == 1
    assert run(configured(folder, "steps=9")) == 0
    assert events_of(folder, "resume")[-1]["step"] == 8 and steps_in(folder) == [8, 9]
    assert len(events_of(folder, "set_aside")) == 1


@pytest.mark.fault(39)
def test_a_run_from_another_folder_is_alone_in_its_own(tmp_path: Path) -> None:
    """What was there is of another timeline, the earlier ones too."""
    other, folder = tmp_path / "other", tmp_path / "run"
    assert run(configured(other, "steps=4")) == 0
    assert run(configured(folder, "steps=6", "checkpoint.keep=9", "seed=1")) == 0
    assert run(configured(folder, f"checkpoint.resume={at(other, 4)}", "steps=5")) == 0
    assert steps_in(folder) == [5] and len(events_of(folder, "set_aside")[0]["checkpoints"]) == 3


@pytest.mark.fault(39)
def test_later_checkpoints_of_others_do_not_push_out_those_of_this_run(tmp_path: Path) -> None:
    for step in (90, 91):
        save_checkpoint(tmp_path, step, {}, {})
    retention = Retention(keep=2)
    for step in (1, 2, 3):
        retention.written(save_checkpoint(tmp_path, step, {}, {}))
        retention.prune(tmp_path)
    assert [path.name[-2:] for path in checkpoints_in(tmp_path)] == ["91", "90", "03", "02"]


@pytest.mark.fault(
    40, "started from a path or with `never`, lost in step 7: goes on from 6 with whole metrics, even if the path was pruned"
)
@pytest.mark.parametrize("wish", ["path", "never"])
def test_a_restart_goes_on_from_what_this_run_wrote(wish: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    if wish == "path":
        assert run(configured(folder, "steps=6", "checkpoint.every=2", "checkpoint.keep=9")) == 0
    path = at(folder, 2) if wish == "path" else wish
    options = ["steps=10", "checkpoint.every=1", "checkpoint.keep=1", "checkpoint.asynchronous=false", f"checkpoint.resume={path}"]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one launch")
    monkeypatch.setenv("TOKENYARD_FAILPOINTS", "step.begin:restart=0:step=7:raise")
    with pytest.raises(RuntimeError, match="failpoint"):
        run(configured(folder, *options))
    assert steps_in(folder) == [6]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run(configured(folder, *options)) == 0
    assert events_of(folder, "resume")[-1]["step"] == 6 and list(losses(folder)) == [*range(1, 11)]
    assert len(events_of(folder, "set_aside")) == (wish == "path")
    check_resume(configured(folder, *options))  # no path is missed that the run does not need
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another launch")  # nobody has begun that one
    assert run(configured(folder, *options)) == 2
