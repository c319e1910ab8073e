"""To and from programs that use torch.distributed.checkpoint (DCP). Its folders, a file of which can run code, are not read here.

dcp.load(state_dict, storage_reader=CheckpointReader(path))     # a checkpoint of tokenyard into tensors of any sharding
save_checkpoint(folder, step, local_shards(state_dict), facts)  # tensors of any sharding into a checkpoint of tokenyard
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.futures import Future

from ..parallel.shard import LocalShard, ShardMetadata, whole
from .manifest import Manifest, read_manifest
from .safetensors_file import DTYPES
from .tensor_reader import TensorReader
from .verify import check_files


@final
class CheckpointReader(StorageReader):
    """Lets `torch.distributed.checkpoint.load` read a checkpoint of tokenyard: each rank the rectangles that it holds.

    The names are the checkpoint's: `model.NAME`, `optimizer.NAME.exp_avg` and `.exp_avg_sq`. The rank that reads the metadata reads
    and hashes every file before. Raises DamagedCheckpoint, one line, for one that is not what was written.
    """

    def __init__(self, path: str | Path) -> None:
        self._path, self._manifest = Path(path), None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins another read, of `checkpoint_id` if it is given."""
        if checkpoint_id is not None:
            self._path, self._manifest = Path(checkpoint_id), None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns shapes, types and rectangles of all tensors."""
        manifest = self._read_manifest()
        check_files(self._path, manifest)
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(DTYPES[record.dtype]),
                    torch.Size(record.shape),
                    [ChunkStorageMetadata(torch.Size(at.offsets), torch.Size(at.sizes)) for at, _, _ in record.chunks],
                )
                for name, record in manifest.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the manifest says where the tensors are."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Returns the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Returns the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies what the plan wants into the tensors of the planner."""
        manifest = self._read_manifest()
        for item in plan.items:
            index = item.storage_index
            if item.type is not LoadItemType.TENSOR or index.fqn not in manifest.tensors or index.offset is None:
                raise ValueError(f"{self._path}: {index.fqn} is no tensor of the checkpoint")
            offsets = tuple(map(sum, zip(index.offset, item.storage_offsets, strict=True)))
            metadata = ShardMetadata(manifest.tensors[index.fqn].shape, offsets, tuple(item.lengths))
            target = planner.resolve_tensor(item).detach()
            with TensorReader(self._path, manifest.tensors) as reader:
                target.copy_(reader.read(index.fqn, metadata))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether `checkpoint_id` is a folder."""
        return Path(checkpoint_id).is_dir()

    def _read_manifest(self) -> Manifest:
        if self._manifest is None:
            self._manifest = read_manifest(self._path)
        return self._manifest


def local_shards(tensors: Mapping[str, torch.Tensor]) -> dict[str, LocalShard]:
    """Returns this rank's part of each tensor by name, for `save_checkpoint`: of a DTensor its shard, of others all."""
    shards = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            metadata = ShardMetadata(tuple(tensor.shape), tuple(offsets), tuple(sizes))
            shards[name] = LocalShard(metadata, tensor.to_local().detach())
        else:
            shards[name] = LocalShard(whole(tensor.shape), tensor.detach())
    return shards
