"""Whatever is wrong with a checkpoint's files is found before any tensor is changed, and named; the one before it is taken."""

import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_run import configured, events_of
from tokenyard.checkpoint.folder import checkpoints_in
from tokenyard.checkpoint.manifest import DamagedCheckpoint
from tokenyard.checkpoint.store import newest_verified, save_checkpoint
from tokenyard.parallel.shard import LocalShard, ShardMetadata
from tokenyard.train.resume import as_checkpoint, find_resume
from tokenyard.train.run import run

CASES = 100
MANIFEST = "manifest.json"


def flip_bit(path: Path, chance: random.Random, steps: list[Path]) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, chance: random.Random, steps: list[Path]) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def remove(path: Path, chance: random.Random, steps: list[Path]) -> None:
    path.unlink()


def swap(path: Path, chance: random.Random, steps: list[Path]) -> None:
    """Shards of two ranks; all they hold has the same shapes."""
    other = path.with_name("shard_00001.safetensors" if "00000" in path.name else "shard_00000.safetensors")
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


def foreign(path: Path, chance: random.Random, steps: list[Path]) -> None:
    """The file of the same name from another step."""
    shutil.copyfile(steps[-1] / path.relative_to(steps[0]), path)


DAMAGES = (flip_bit, truncate, remove, swap, foreign)


def write(folder: Path) -> None:
    """Two checkpoints, two shards each, a tokenizer beside."""
    rank = dist.get_rank()
    for step in (1, 2):
        piece = ShardMetadata((2, 500), (rank, 0), (1, 500))
        tensors = {name: LocalShard(piece, torch.full((1, 500), 10.0 * step + rank)) for name in ("model.a", "model.b")}
        save_checkpoint(folder, step, tensors, {"step": step}, attach)


def attach(folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "about.json").write_text('{"kind": "bytes"}')


@pytest.mark.fault(3)
def test_a_hundred_damages(ranks, tmp_path: Path, record_property) -> None:
    ranks(2, write, tmp_path / "whole")
    files = sorted(
        path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / "step_00000002").rglob("*") if path.is_file()
    )
    found = 0
    for case in range(CASES):
        chance = random.Random(case)
        damage = DAMAGES[case % len(DAMAGES)]
        shards = [file for file in files if file.suffix == ".safetensors"]
        copy = shutil.copytree(tmp_path / "whole", tmp_path / "copy")
        victim = copy / chance.choice(shards if damage in (swap, foreign) else files)
        damage(victim, chance, checkpoints_in(copy))
        refused: list[DamagedCheckpoint] = []
        chosen = newest_verified(checkpoints_in(copy), lambda path, error, into=refused: into.append(error))
        assert chosen == copy / "step_00000001", (case, damage.__name__, victim)
        assert refused[0].file.name in (victim.name, "shard_00000.safetensors" if damage is swap else victim.name), refused[0]
        assert refused[0].file.name in str(refused[0]) or refused[0].file.name == MANIFEST
        found += 1
        shutil.rmtree(copy)
    record_property("measured", f"{found}/{CASES} damages (bit, truncation, missing, swapped, foreign) refused by name, fell back")


def find(folder: Path, resume: str) -> str:
    """What this rank goes on from, or its error."""
    try:
        return str(find_resume(configured(folder, f"checkpoint.resume='{resume}'"), folder))
    except ValueError as error:
        return str(error)


@pytest.mark.fault(3)
def test_all_ranks_go_on_from_the_same_one_and_a_path_is_refused(ranks, tmp_path: Path, capsys, record_property) -> None:
    assert run(configured(tmp_path / "run")) == 0
    newest = tmp_path / "run" / "checkpoints" / "step_00000006"
    shard = newest / "shard_00000.safetensors"
    flip_bit(shard, random.Random(1), [])
    assert ranks(2, find, tmp_path / "run", "auto") == [str(newest.with_name("step_00000004"))] * 2
    assert as_checkpoint(tmp_path / "run") == newest.with_name("step_00000004")  # as generate and evaluate do
    [refused] = events_of(tmp_path / "run", "checkpoint_refused")
    assert refused["file"] == str(shard) and "its hash" in refused["reason"]
    for text in ranks(2, find, tmp_path / "other", str(newest)):
        assert f"checkpoint file {shard} is damaged" in text and "\n" not in text
    capsys.readouterr()
    assert run(configured(tmp_path / "other", f"checkpoint.resume='{newest}'")) == 2
    assert capsys.readouterr().err.count("shard_00000.safetensors") == 1
    remove(newest.with_name("step_00000004") / MANIFEST, random.Random(1), [])
    assert run(configured(tmp_path / "run")) == 2
    assert "none of the 1 before it is whole" in capsys.readouterr().err
    record_property("measured", "two ranks fall back to the same step; a damaged path: exit 2, file named; all damaged: exit 2")
