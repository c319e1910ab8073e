"""Where planned rectangles come from: a folder of safetensors files and one manifest."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from .manifest import ChunkRecord, Manifest, TensorRecord, check_sizes
from .shards import DTYPES, open_shard, read_rectangle
from .verify import check_files, check_headers


class CheckpointReader(StorageReader):
    """Reads rectangles from the checkpoint `path`; if it is to `verify`, the `world` ranks share the hashing of its files."""

    def __init__(self, path: Path, manifest: Manifest, *, rank: int, world: int, verify: bool):
        self.path = path
        self.manifest = manifest
        self.rank, self.world = rank, world
        self.verify = verify

    def reset(self, checkpoint_id: Any = None) -> None:
        raise AssertionError("a reader is for one checkpoint")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({name: _metadata(record) for name, record in self.manifest.tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.stored = {
            MetadataIndex(name, chunk.offsets): chunk for name, record in self.manifest.tensors.items() for chunk in record.chunks
        }

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Every check of the files is here: after it all ranks hear of each other's errors, and only then does anybody read."""
        needed = self._by_file(plan.items)
        check_sizes(self.path, self.manifest, needed)
        check_headers(self.path, self.manifest, set(needed))
        if self.verify:
            check_files(self.path, self.manifest, self.rank, self.world)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for name, reads in self._by_file(plan.items).items():
            with open_shard(self.path / name) as file:
                for item, chunk in reads:
                    target = planner.resolve_tensor(item)
                    target.copy_(read_rectangle(file, chunk.key, item.storage_offsets, item.lengths))
                    planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def _by_file(self, items: Iterable[ReadItem]) -> dict[str, list[tuple[ReadItem, ChunkRecord]]]:
        grouped = defaultdict(list)
        for item in items:
            chunk = self.stored[item.storage_index]
            grouped[chunk.file].append((item, chunk))
        return grouped


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _metadata(record: TensorRecord) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in record.chunks]
    return TensorStorageMetadata(TensorProperties(dtype=DTYPES[record.dtype]), torch.Size(record.shape), chunks)
