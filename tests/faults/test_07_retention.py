"""Pruning never takes the last checkpoint that is whole, and a crash in it harms nothing."""

from pathlib import Path

import pytest
import torch
from checkpoint_run import configured, steps_in
from tokenyard.checkpoint.folder import checkpoints_in, remove_leftovers, step_of
from tokenyard.checkpoint.manifest import DamagedCheckpoint
from tokenyard.checkpoint.retention import LOSS, Retention
from tokenyard.checkpoint.store import load_checkpoint, newest_verified, save_checkpoint
from tokenyard.parallel.shard import LocalShard, whole
from tokenyard.train.run import run


def save(folder: Path, step: int, loss: float | None = None) -> Path:
    return save_checkpoint(folder, step, held(float(step)), {LOSS: loss})


def held(value: float) -> dict[str, LocalShard]:
    return {"x": LocalShard(whole((64,)), torch.full((64,), value))}


def damage(path: Path) -> None:
    shard = path / "shard_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")


def left(folder: Path) -> list[int]:
    return [step_of(path) for path in checkpoints_in(folder)][::-1]


@pytest.mark.fault(7)
def test_the_newest_whole_one_is_never_pruned(tmp_path: Path, record_property) -> None:
    retention = Retention(keep=2)
    for step in (1, 2, 3, 4):
        retention.written(save(tmp_path, step))
    damage(tmp_path / "step_00000004")
    damage(tmp_path / "step_00000003")
    assert retention.prune(tmp_path) == [tmp_path / "step_00000001"]
    assert left(tmp_path) == [2, 3, 4]
    assert Retention(keep=1).prune(tmp_path) == [tmp_path / "step_00000003"]
    refused: list[DamagedCheckpoint] = []
    chosen = newest_verified(checkpoints_in(tmp_path), lambda path, error: refused.append(error))
    assert chosen == tmp_path / "step_00000002" and len(refused) == 1
    into = held(0.0)
    load_checkpoint(chosen, into)
    assert into["x"].tensor.eq(2).all()
    for path in checkpoints_in(tmp_path):
        damage(path)
    save(tmp_path, 5)
    damage(tmp_path / "step_00000005")
    assert Retention(keep=1).prune(tmp_path) == []
    record_property(
        "measured", "keep=2, both newest damaged: the whole one before them stays and loads; nothing whole: nothing pruned"
    )


@pytest.mark.fault(7)
def test_every_and_best_are_kept(tmp_path: Path) -> None:
    for step, loss in ((1, 2.0), (2, 1.0), (3, None), (4, 1.5), (5, 3.0), (6, 4.0), (7, 5.0)):
        save(tmp_path, step, loss)
    assert len(Retention(keep=1, every=3, best=2).prune(tmp_path)) == 2
    assert left(tmp_path) == [2, 3, 4, 6, 7]


@pytest.mark.fault(7)
def test_a_crash_in_pruning_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    monkeypatch.setenv("TOKENYARD_FAILPOINTS", "checkpoint.prune:raise")
    with pytest.raises(RuntimeError, match=r"failpoint checkpoint\.prune"):
        Retention(keep=1).prune(tmp_path)
    monkeypatch.delenv("TOKENYARD_FAILPOINTS")
    assert len(remove_leftovers(tmp_path)) == 1
    Retention(keep=1).prune(tmp_path)
    assert left(tmp_path) == [3] and [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


@pytest.mark.fault(7)
def test_a_run_keeps_what_it_is_told_to(tmp_path: Path) -> None:
    keeping = ["checkpoint.keep=1", "checkpoint.keep_every=4", "checkpoint.keep_best=1", "checkpoint.every=1", "evaluate.every=1"]
    assert run(configured(tmp_path / "run", "optimizer.lr=0.5", *keeping)) == 0
    steps = steps_in(tmp_path / "run")
    assert {4, 6} <= set(steps) and len(steps) in (2, 3)
