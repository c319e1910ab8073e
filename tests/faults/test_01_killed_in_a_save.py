"""Killed at each phase of a save, the run goes on from the newest complete step, and what the save left is removed and logged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_run import events_of, everything, losses, same_tensors, steps_in, words
from forked_runs import forked

PHASES = {
    "shard half written": ("checkpoint.shard_begun:rank=1:step=4", 2),
    "a shard of two written": ("checkpoint.shard_written:rank=1:step=4", 2),
    "shards, no manifest": ("checkpoint.before_manifest:rank=0:step=4", 2),
    "manifest, no name": ("checkpoint.before_rename:rank=0:step=4", 2),
    "just named": ("checkpoint.renamed:rank=0:step=4", 4),
    "in the middle of pruning": ("checkpoint.prune:rank=0:step=2", 4),
}
"""The failpoint, and the step from which the next start goes on: the save is that of step 4, after which step 2 is pruned."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert forked(2, words(folder, "checkpoint.keep=1", "parallel.expert=2"), folder.parent / "log").codes == [0, 0]
    return folder


@pytest.mark.fault(1)
@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_a_save(tmp_path: Path, straight: Path, phase: str, record_property) -> None:
    failpoint, step = PHASES[phase]
    folder = tmp_path / "run"
    line = words(folder, "checkpoint.keep=1", "parallel.expert=2")
    killed = forked(2, line, tmp_path / "killed", TOKENYARD_FAILPOINTS=f"{failpoint}:SIGKILL")
    assert -9 in killed.codes, killed.output
    debris = [path.name for path in (folder / "checkpoints").glob("*.tmp-*")]
    again = forked(2, line, tmp_path / "again")
    assert again.codes == [0, 0], again.output
    assert [event["step"] for event in events_of(folder, "resume")] == [step], again.output
    assert steps_in(folder) == [6] and not list((folder / "checkpoints").glob("*.tmp-*"))
    assert {Path(event["path"]).name for event in events_of(folder, "leftover_removed")} == set(debris)
    assert losses(folder) == losses(straight)
    ours, theirs = (everything(each / "checkpoints" / "step_00000006") for each in (folder, straight))
    assert same_tensors(ours, theirs)
    record_property(
        "measured", f"{phase}: went on after step {step}, {len(debris)} left-over folders removed, same bits at the end"
    )


@pytest.mark.fault(1)
def test_killed_in_an_export(tmp_path: Path, straight: Path, record_property) -> None:
    """A folder of another name is left, which the next export removes."""
    target, script = tmp_path / "theirs", "import sys; from tokenyard.launch.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "export", str(straight), str(target)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    killed = environment | {"TOKENYARD_FAILPOINTS": "export.half:SIGKILL"}
    assert subprocess.run(command, env=killed, timeout=60, check=False).returncode == -9
    assert not target.exists() and len(list(tmp_path.glob("theirs.tmp-*"))) == 1
    again = subprocess.run(command, env=environment, timeout=60, check=False, capture_output=True, text=True)
    assert again.returncode == 0 and "an interrupted export had left" in again.stderr, again.stderr
    assert [path.name for path in tmp_path.glob("theirs*")] == ["theirs"]
    record_property("measured", "mid-export: nothing under the final name, the debris removed and logged by the next one")
