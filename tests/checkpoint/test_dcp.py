"""torch.distributed.checkpoint reads our checkpoints, and what it has read becomes one of ours, bit for bit, on any sharding."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tokenyard.checkpoint.dcp import CheckpointReader, local_shards
from tokenyard.checkpoint.store import read_whole, save_checkpoint
from tokenyard.parallel.shard import LocalShard, ShardMetadata, whole
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

SHAPES = {"rows": (7, 6), "columns": (4, 5), "cube": (4, 3, 2), "number": (), "narrow": (9,)}
PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "cube": Shard(0), "number": Replicate(), "narrow": Replicate()}


def values() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    found = {f"model.{name}": torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    found["model.narrow"] = found["model.narrow"].bfloat16()
    return found


def sharded(fill: bool) -> dict[str, DTensor]:
    mesh = init_device_mesh("cpu", (2,))
    return {
        name: distribute_tensor(tensor if fill else torch.zeros_like(tensor), mesh, [PLACEMENTS[name.removeprefix("model.")]])
        for name, tensor in values().items()
    }


def ours_to_dcp_and_back(ours: str, theirs: str, again: str) -> bool:
    """Reads a checkpoint of one rank into shards, writes them with DCP's own writer, reads that with DCP, and saves it as ours."""
    found = sharded(fill=False)
    dcp.load(found, storage_reader=CheckpointReader(ours))
    same = all(torch.equal(found[name].full_tensor(), tensor) for name, tensor in values().items())
    dcp.save(found, checkpoint_id=theirs)
    read = sharded(fill=False)
    dcp.load(read, checkpoint_id=theirs)
    save_checkpoint(Path(again), 3, local_shards(read), {"step": 3})
    return same and all(torch.equal(read[name].to_local(), found[name].to_local()) for name in read)


def split_on_ranks(folder: str) -> None:
    """A checkpoint of two ranks, each with other rows or columns than DTensor gives them."""
    rank, held = dist.get_rank(), {}
    for name, tensor in values().items():
        metadata = whole(tensor.shape)
        if tensor.ndim > 1:
            first = [tensor.shape[0] // 3, tensor.shape[0] - tensor.shape[0] // 3]
            metadata = ShardMetadata(
                tuple(tensor.shape), (rank * first[0], *[0] * (tensor.ndim - 1)), (first[rank], *tensor.shape[1:])
            )
        held[name] = LocalShard(metadata, metadata.cut(tensor).clone())
    save_checkpoint(Path(folder), 1, held, {"step": 1})


@pytest.mark.parametrize("split", [False, True], ids=["of one rank", "of two"])
def test_both_directions_on_two_ranks(ranks, tmp_path: Path, split: bool) -> None:
    if split:
        ranks(2, split_on_ranks, str(tmp_path / "ours"))
    else:
        save_checkpoint(tmp_path / "ours", 1, local_shards(values()), {"step": 1})
    (ours,) = (tmp_path / "ours").glob("step_*")
    assert ranks(2, ours_to_dcp_and_back, str(ours), str(tmp_path / "theirs"), str(tmp_path / "again")) == [True, True]
    again = read_whole(tmp_path / "again" / "step_00000003", "")
    assert again.keys() == values().keys() and all(torch.equal(again[name], tensor) for name, tensor in values().items())
    assert json.loads((tmp_path / "again" / "step_00000003" / "manifest.json").read_text())["facts"] == {"step": 3}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_process_and_damage(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, local_shards(values()), {})
    (ours,) = tmp_path.glob("step_*")
    found = {name: torch.zeros_like(tensor) for name, tensor in values().items()}
    dcp.load(found, storage_reader=CheckpointReader(ours))
    assert all(torch.equal(found[name], tensor) for name, tensor in values().items())
    with pytest.raises(CheckpointException, match=r"model\.other"):
        dcp.load({"model.other": torch.zeros(2)}, storage_reader=CheckpointReader(ours))
    (shard,) = ours.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointException, match=shard.name):
        dcp.load(found, storage_reader=CheckpointReader(ours))
