"""No room on the disk fails one save, on all ranks; the checkpoint before it stays, and the policy decides about the run."""

import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_run import configured, events_of, losses, steps_in, words
from forked_runs import forked
from tokenyard.checkpoint.folder import newest_checkpoint
from tokenyard.checkpoint.store import load_checkpoint, save_checkpoint
from tokenyard.parallel.shard import LocalShard, whole
from tokenyard.train.run import run

FULL = "checkpoint.shard_written:rank=1:step=4:enospc"


@pytest.mark.fault(4)
@pytest.mark.parametrize(("policy", "code", "steps"), [("continue", 0, [2, 6]), ("stop", 74, [2])])
def test_a_full_disk_on_one_rank(tmp_path: Path, policy: str, code: int, steps: list[int], record_property) -> None:
    folder = tmp_path / "run"
    line = words(folder, f"checkpoint.on_failure={policy}", "parallel.expert=2")
    ended = forked(2, line, tmp_path / "log", TOKENYARD_FAILPOINTS=FULL)
    assert ended.codes == [code] * 2, ended.output
    assert steps_in(folder) == steps and not list((folder / "checkpoints").glob("*.tmp-*"))
    [failed] = events_of(folder, "checkpoint_failed")
    assert failed["step"] == 4 and "rank 1: OSError: [Errno 28] No space left on device" in failed["error"]
    assert "step 4: checkpoint" in ended.output and "NOT written" in ended.output
    if policy == "stop":
        assert re.search(
            r"^tokenyard: checkpoint .*step_00000004 was not written: .*; the newest there is: .*step_00000002$", ended.output, re.M
        )
    else:
        assert sorted(losses(folder)) == [1, 2, 3, 4, 5, 6]
    record_property("measured", f"ENOSPC on rank 1, policy {policy}: exit {code} on both ranks, checkpoints {steps} left")


@pytest.mark.fault(4)
def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The writer meets EFBIG after so many bytes, as it would ENOSPC."""
    x = torch.arange(100_000.0)
    held = {"x": LocalShard(whole(x.shape), x)}
    path = save_checkpoint(tmp_path, 1, held, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(RuntimeError, match=r"step_00000002 was not saved: rank 0: OSError: .*File too large"):
            save_checkpoint(tmp_path, 2, held, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert newest_checkpoint(tmp_path) == path and [entry.name for entry in tmp_path.iterdir()] == ["step_00000001"]
    load_checkpoint(path, held)


@pytest.mark.fault(4)
def test_too_little_space_is_seen_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    assert run(configured(tmp_path / "run", "steps=2")) == 74
    assert "bytes and a tenth more" in capsys.readouterr().err
    assert len(events_of(tmp_path / "run", "checkpoint_failed")) == 2 and steps_in(tmp_path / "run") == []
