"""An asynchronous save writes the state of its step, byte for byte as a synchronous one, whatever training does meanwhile."""

from contextlib import closing
from pathlib import Path

import pytest
import torch
from checkpoint_run import configured
from tokenyard.checkpoint.manifest import read_manifest
from tokenyard.train.checkpointing import write_checkpoint
from tokenyard.train.run import single_step
from tokenyard.train.setup import open_session


def save_both_ways(folder: Path, overrides: list[str]) -> tuple[int, bool]:
    """At step 3: synchronous, then asynchronous with a slow writer beside which training goes on. Steps taken, still writing?"""
    with closing(open_session(configured(folder, *overrides), torch.device("cpu"))) as session:
        while session.step < 3:
            single_step(session)
        folder_of_run = session.saver.folder
        session.saver.folder = folder / "synchronous"
        outcome = write_checkpoint(session, asynchronous=False)
        assert outcome is not None and outcome.error is None
        session.saver.folder = folder_of_run
        assert write_checkpoint(session, asynchronous=True) is None
        for _ in range(5):
            single_step(session)
        writing = session.saver.flags()[1]
        outcome = session.saver.wait()
        assert outcome is not None and outcome.error is None and outcome.step == 3
        return session.step - 3, writing


@pytest.mark.fault(5)
@pytest.mark.parametrize("world", [1, 2])
def test_training_goes_on_beside_a_save(
    ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, record_property
) -> None:
    overrides = ["parallel.expert=2"] if world > 1 else []
    if world == 1:
        monkeypatch.setenv("TOKENYARD_FAILPOINTS", "checkpoint.before_manifest:sleep=1.5")
        assert save_both_ways(tmp_path / "run", overrides) == (5, True)
    else:
        assert [taken for taken, _ in ranks(2, save_both_ways, tmp_path / "run", overrides)] == [5, 5]
    ours, theirs = (read_manifest(tmp_path / "run" / kind / "step_00000003") for kind in ("checkpoints", "synchronous"))
    assert ours.files == theirs.files and ours.tensors == theirs.tensors and ours.experts == theirs.experts
    record_property(
        "measured", f"{world} ranks, 5 steps during the save: {len(ours.files)} files equal the synchronous ones byte for byte"
    )
