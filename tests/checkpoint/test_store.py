"""A checkpoint written on one layout opens on any other, bit for bit, and each rectangle is written once."""

import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_layouts import LAYOUTS, SHAPES, global_tensors, shard_of
from safetensors.torch import load_file
from tokenyard.checkpoint.manifest import read_manifest
from tokenyard.checkpoint.store import load_checkpoint, read_facts, read_whole, save_checkpoint
from tokenyard.parallel.shard import LocalShard, whole

FACTS = {"config": {"lr": 0.1, "names": ["a"]}, "rate": 1e-300, "nothing": None}


def held_by(layout: str, rank: int, world: int, fill: bool) -> dict[str, LocalShard]:
    held = {}
    for name, tensor in global_tensors().items():
        shard = shard_of(layout, tuple(tensor.shape), rank, world)
        held[name] = LocalShard(shard, shard.cut(tensor) if fill else torch.full(shard.sizes, 1, dtype=tensor.dtype))
    return held


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def save_as(folder, layout):
    return save_checkpoint(Path(folder), 100, held_by(layout, dist.get_rank(), dist.get_world_size(), fill=True), FACTS)


def load_as(path, layouts):
    """The (layout, name) that did not come back, on this rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return wrong_after_load(path, layouts, rank, world)


def wrong_after_load(path, layouts, rank, world):
    wrong = []
    for layout in layouts:
        got, expected = held_by(layout, rank, world, fill=False), held_by(layout, rank, world, fill=True)
        assert load_checkpoint(path, got) == FACTS
        wrong += [(layout, name) for name in SHAPES if not same_bits(got[name].tensor, expected[name].tensor)]
    return wrong


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_opens_on_any_other(ranks, tmp_path, layout):
    [path, *others] = ranks(4, save_as, tmp_path, layout)
    assert path == tmp_path / "step_00000100"
    assert set(others) == {path}
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000100"]
    for world in (2, 4):
        assert ranks(world, load_as, path, LAYOUTS) == [[]] * world
    assert wrong_after_load(path, ["replicate"], 0, 1) == []
    assert_tiled(path)


def test_one_process_to_many(ranks, tmp_path):
    path = save_checkpoint(tmp_path, 100, held_by("replicate", 0, 1, fill=True), FACTS)
    assert ranks(4, load_as, path, LAYOUTS) == [[]] * 4
    assert_tiled(path)


def assert_tiled(path):
    """Each element of each tensor is in one chunk; the files have these bytes and their headers, nothing else."""
    manifest = read_manifest(path)
    for name, record in manifest.tensors.items():
        count = torch.zeros(record.shape)
        for chunk in record.chunks:
            assert chunk.metadata.shape == record.shape and chunk.key == name
            chunk.metadata.cut(count).add_(1)
        assert (count == 1).all(), name
    assert set(manifest.tensors) == set(SHAPES)
    assert {entry.name for entry in path.iterdir()} == {*manifest.files, "manifest.json"}
    stored = sum(tensor.nbytes for file in manifest.files for tensor in load_file(path / file).values())
    assert stored == sum(tensor.nbytes for tensor in global_tensors().values())


def save_replicas(folder):
    tensors = {f"model.{index}": torch.full((256,), float(index)) for index in range(8)}
    if dist.get_rank() == 0:
        tensors["only"] = torch.zeros(768)
    return save_checkpoint(folder, 1, {name: LocalShard(whole(one.shape), one) for name, one in tensors.items()}, {})


def test_replicas_are_written_once_by_the_rank_with_the_least_to_write(ranks, tmp_path):
    path = ranks(4, save_replicas, tmp_path)[0]
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in sorted(path.glob("*.safetensors"))]
    # 11 KiB in shards of at most 3: rank 0 writes the one that it alone holds, the others share the replicas.
    assert sizes == [3072, 3072, 3072, 2048]


def save_per_rank(folder):
    name = f"rng.torch.rank_{dist.get_rank()}"
    return save_checkpoint(folder, 1, {name: LocalShard(whole((4,)), torch.full((4,), dist.get_rank(), dtype=torch.uint8))}, {})


def load_per_rank(path):
    state = torch.zeros(4, dtype=torch.uint8)
    load_checkpoint(path, {f"rng.torch.rank_{dist.get_rank()}": LocalShard(whole((4,)), state)})
    return state.tolist()


def test_a_name_may_belong_to_one_rank(ranks, tmp_path):
    path = ranks(2, save_per_rank, tmp_path)[0]
    assert ranks(2, load_per_rank, path) == [[0] * 4, [1] * 4]


def test_parameters_are_filled_in_place(tmp_path):
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    transposed = torch.zeros(3, 2).T
    path = save_checkpoint(tmp_path, 1, {"model.weight": LocalShard(whole((2, 3)), weight)}, {})
    load_checkpoint(path, {"model.weight": LocalShard(whole((2, 3)), transposed)})
    assert torch.equal(transposed, weight)
    with torch.no_grad():
        weight.zero_()
    load_checkpoint(path, {"model.weight": LocalShard(whole((2, 3)), weight)})
    assert torch.equal(transposed, weight)


def test_whole_tensors_and_facts_for_one_device(ranks, tmp_path):
    path = ranks(4, save_as, tmp_path, "grid")[0]
    expected = global_tensors()
    got = read_whole(path)
    assert set(got) == {name.removeprefix("model.") for name in SHAPES if name.startswith("model.")}
    assert all(same_bits(tensor, expected[f"model.{name}"]) for name, tensor in got.items())
    assert set(read_whole(path, "")) == set(SHAPES)
    assert read_facts(path) == FACTS
    with pytest.raises(ValueError, match=r"no tensor's name begins with 'modle\.'"):
        read_whole(path, "modle.")


def test_files_are_safetensors_and_json_and_follow_the_umask(ranks, tmp_path):
    path = ranks(2, save_as, tmp_path, "shard")[0]
    for file in path.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~current_umask()
        assert file.suffix in (".safetensors", ".json")
        assert not zipfile.is_zipfile(file)
        content = file.read_bytes()
        # A pickle of protocol 2 or later begins with 0x80, a safetensors file with its header's length and "{".
        assert content[:1] == b"{" or (content[8:9] == b"{" and int.from_bytes(content[:8], "little") < len(content))
    assert path.stat().st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask")).split()[1], 8)


def test_the_package_knows_no_pickle():
    for file in (Path(__file__).parents[2] / "checkpoint").glob("*.py"):
        for word in ("pickle", "torch.save", "torch.load", "zipfile"):
            assert word not in file.read_text(), (file, word)
