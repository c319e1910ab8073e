"""A folder has its final name only when it is complete, whatever fails; the newest complete checkpoint is never lost."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tokenyard.checkpoint import writer
from tokenyard.checkpoint.folder import newest_checkpoint, remove_leftovers
from tokenyard.checkpoint.retention import Retention
from tokenyard.checkpoint.store import load_checkpoint, read_facts, save_checkpoint
from tokenyard.parallel.shard import LocalShard, whole


def save(folder, step, value=0.0):
    return save_checkpoint(Path(folder), step, {"x": LocalShard(whole((4,)), torch.full((4,), value))}, {"value": value})


def value_of(path):
    x = torch.zeros(4)
    assert load_checkpoint(path, {"x": LocalShard(whole((4,)), x)}) == {"value": x[0].item()}
    return x[0].item()


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_newest_is_by_step_and_complete(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    assert newest_checkpoint(tmp_path) is None
    for step in (100, 20, 123456789):
        save(tmp_path, step)
    (tmp_path / "step_123456790").mkdir()
    (tmp_path / "step_999999999.tmp-1").mkdir()
    (tmp_path / "step_999999999.tmp-1" / "manifest.json").write_text("{}")
    (tmp_path / "step_9999999999x").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "step_123456789"


def test_prune_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert Retention(2).prune(tmp_path) == [tmp_path / "step_00000001", tmp_path / "step_00000002"]
    assert Retention(5).prune(tmp_path) == []
    assert names(tmp_path) == ["step_00000003", "step_00000004"]
    assert Retention(0).prune(tmp_path) == [tmp_path / "step_00000003"]
    assert Retention(-1).prune(tmp_path) == []
    assert newest_checkpoint(tmp_path) == tmp_path / "step_00000004"


def test_a_step_can_be_saved_again(tmp_path):
    save(tmp_path, 5, 1.0)
    path = save(tmp_path, 5, 2.0)
    assert value_of(path) == 2.0
    assert names(tmp_path) == ["step_00000005"]


class Crash(BaseException):
    """As good as the end of the process: nothing between here and the test handles it."""


@pytest.mark.parametrize("phase", ["write_safetensors", "write_manifest", "sync_folder", "give_name"])
@pytest.mark.parametrize("earlier", [True, False])
def test_no_failure_shows_or_loses_a_final_name(tmp_path, monkeypatch, phase, earlier):
    final = save(tmp_path, 5, 1.0) if earlier else tmp_path / "step_00000005"

    def fail(*args):
        assert final.exists() == earlier
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(writer, phase, fail)
        with pytest.raises(RuntimeError, match="step_00000005 was not saved: rank 0: OSError: disk full"):
            save(tmp_path, 5, 2.0)
    assert names(tmp_path) == (["step_00000005"] if earlier else [])
    assert newest_checkpoint(tmp_path) == (final if earlier else None)
    assert not earlier or value_of(final) == 1.0


def test_a_failed_replacement_gives_the_name_back(tmp_path, monkeypatch):
    final = save(tmp_path, 5, 1.0)
    rename = Path.rename

    def fail(path, target):
        if ".tmp-" in path.name and writer.REPLACED not in path.name:
            raise OSError("stale handle")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(RuntimeError, match="stale handle"):
            save(tmp_path, 5, 2.0)
    assert value_of(final) == 1.0
    assert names(tmp_path) == ["step_00000005"]


def test_leftovers_are_removed_and_what_was_set_aside_comes_back(tmp_path):
    save(tmp_path, 4, 4.0)
    # The process ended between the two renames of a replacement.
    save(tmp_path, 5, 5.0).rename(tmp_path / f"step_00000005{writer.REPLACED}aa")
    save(tmp_path, 6, 6.0).rename(tmp_path / "step_00000005.tmp-bb")
    (tmp_path / "step_00000007.tmp-cc").mkdir()
    # After both renames, while the old one was being removed.
    (tmp_path / f"step_00000004{writer.REPLACED}dd").mkdir()
    (tmp_path / "notes.tmp-1").write_text("not ours")
    assert newest_checkpoint(tmp_path) == tmp_path / "step_00000004"
    removed = {path.name for path in remove_leftovers(tmp_path)}
    assert removed == {"step_00000005.tmp-bb", "step_00000007.tmp-cc", f"step_00000004{writer.REPLACED}dd"}
    assert names(tmp_path) == ["notes.tmp-1", "step_00000004", "step_00000005"]
    assert value_of(newest_checkpoint(tmp_path)) == 5.0
    assert remove_leftovers(tmp_path / "nowhere") == []


def save_with_a_failing_rank(folder, how):
    """Rank 1 fails once its file is written and rank 0's may be, too."""
    write = writer.write_safetensors

    def write_and_fail(*args):
        write(*args)
        if how == "die":
            os._exit(3)
        raise OSError("disk full")

    writer.write_safetensors = write_and_fail if dist.get_rank() == 1 else write
    mine = LocalShard(whole((4,)), torch.zeros(4))
    try:
        save_checkpoint(folder, 5, {f"x{dist.get_rank()}": mine}, {})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        writer.write_safetensors = write


def test_one_rank_fails(ranks, tmp_path):
    text = f"RuntimeError: checkpoint {tmp_path / 'step_00000005'} was not saved: rank 1: OSError: disk full"
    assert ranks(2, save_with_a_failing_rank, tmp_path, "raise") == [text] * 2
    assert names(tmp_path) == []


def test_one_rank_dies(ranks, tmp_path):
    with pytest.raises(RuntimeError, match="rank 1 died with exit code 3"):
        ranks(2, save_with_a_failing_rank, tmp_path, "die")
    assert newest_checkpoint(tmp_path) is None
    assert not (tmp_path / "step_00000005").exists()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_ranks_replace_a_step(ranks, tmp_path):
    save(tmp_path, 5, 1.0)
    ranks(2, save, tmp_path, 5, 2.0)
    assert read_facts(tmp_path / "step_00000005") == {"value": 2.0}
    assert value_of(tmp_path / "step_00000005") == 2.0
    assert names(tmp_path) == ["step_00000005"]
