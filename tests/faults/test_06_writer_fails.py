"""A writer that raises is known to all ranks within a step; the next save is waited for; the run ends as it should."""

from pathlib import Path

import pytest
from checkpoint_run import events_of, steps_in, words
from forked_runs import forked


@pytest.mark.fault(6)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_writer_raises(tmp_path: Path, rank: int, record_property) -> None:
    """Step 5 begins while it is writing; what happens to it from then on is told by the flags of step 6."""
    folder = tmp_path / "run"
    line = words(folder, "steps=8", "checkpoint.every=4", "parallel.expert=2")
    ended = forked(2, line, tmp_path / "log", TOKENYARD_FAILPOINTS=f"checkpoint.shard_begun:rank={rank}:step=4:raise")
    assert ended.codes == [0, 0], ended.output
    [failed], [saved] = events_of(folder, "checkpoint_failed"), events_of(folder, "checkpoint")
    assert failed["step"] == 4 and failed["told_step"] <= 6 and f"rank {rank}: RuntimeError: failpoint" in failed["error"]
    assert saved["step"] == 8 and saved["blocked_seconds"] <= saved["seconds"]
    assert steps_in(folder) == [8] and not list((folder / "checkpoints").glob("*.tmp-*"))
    record_property("measured", f"raised on rank {rank} in the save of step 4: told on all ranks after step {failed['told_step']}")


@pytest.mark.fault(6)
@pytest.mark.parametrize(("dry_step", "code"), [("false", 74), ("true", 73)])
def test_a_writer_that_hangs_does_not_hold_up_the_end(tmp_path: Path, dry_step: str, code: int, record_property) -> None:
    """Nor the begin, where the dry step finds it."""
    folder = tmp_path / "run"
    line = words(
        folder, "steps=4", "checkpoint.every=0", "checkpoint.timeout_seconds=1", "parallel.expert=2", f"debug.dry_step={dry_step}"
    )
    ended = forked(2, line, tmp_path / "log", TOKENYARD_FAILPOINTS="checkpoint.shard_written:rank=1:sleep=600")
    assert ended.codes == [code, code], ended.output
    assert "took longer than checkpoint.timeout_seconds=1" in ended.output
    record_property(
        "measured", "a writer that sleeps for ever: both ranks end after the time limit, code 74; 73 if in the dry step"
    )
