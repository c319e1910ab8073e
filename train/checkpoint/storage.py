"""Where the planned rectangles go to and come from: a folder of safetensors files and one manifest."""

import secrets
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from .manifest import MANIFEST, ChunkRecord, FileRecord, Manifest, TensorRecord, checked_facts, write_manifest
from .shards import CODES, DTYPES, hash_file, open_shard, read_rectangle, sync_folder, write_shard

REPLACED = ".tmp-replaced-"


class CheckpointWriter(StorageWriter):
    """Writes `folder/step_XXXXXXXX` under a temporary name that all ranks share, and renames it when everything is on the disk."""

    def __init__(self, folder: Path, step: int, facts: dict[str, Any]):
        self.final = folder / f"step_{step:08d}"
        self.step = step
        self.facts = facts
        self.temporary: Path | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        raise AssertionError("a writer is for one checkpoint")

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the folder is made once the plan is good."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.facts = checked_facts(self.facts)
        self.final.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = _beside(self.final, ".tmp-")
        self.temporary.mkdir()
        files = (self.temporary / f"shard_{rank:05d}.safetensors" for rank in range(len(plans)))
        return [replace(plan, storage_data=file) for plan, file in zip(plans, files, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        path: Path = plan.storage_data
        # A rank holds one piece of a tensor at most, so the tensor's name will do as the key in its file.
        tensors: dict[str, Any] = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        results = []
        if tensors:
            record = FileRecord(*write_shard(path, tensors))
            results = [
                WriteResult(item.index, tensors[item.index.fqn].nbytes, Stored(path.name, item.index.fqn, record))
                for item in plan.items
            ]
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self.temporary is not None
        stored = {result.index: result.storage_data for rank in results for result in rank}
        files = {one.file: one.record for one in stored.values()}
        write_manifest(self.temporary / MANIFEST, Manifest(self.step, self.facts, _tensor_records(metadata, stored), files))
        sync_folder(self.temporary)
        _give_name(self.temporary, self.final)

    def discard(self) -> None:
        """Remove the temporary folder of a save that failed; rank 0 made it and removes it, when all ranks have stopped."""
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


class CheckpointReader(StorageReader):
    """Reads rectangles from the checkpoint `path`; the `world` ranks share the checking of its files."""

    def __init__(self, path: Path, manifest: Manifest, *, rank: int, world: int, verify: bool):
        self.path = path
        self.manifest = manifest
        self.share = sorted(manifest.files)[rank::world]
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
        for name in sorted({*needed, *self.share}):
            self._check_size(name)
        for name, reads in needed.items():
            self._check_header(name, [item for item, _ in reads])
        for name in self.share if self.verify else []:
            if hash_file(self.path / name) != self.manifest.files[name].hash:
                raise ValueError(f"checkpoint file {self.path / name} is damaged: its hash is not the one in {MANIFEST}")
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

    def _check_size(self, name: str) -> None:
        path, expected = self.path / name, self.manifest.files[name].bytes
        if not path.is_file():
            raise ValueError(f"checkpoint file {path} is missing: {MANIFEST} lists it with {expected} bytes")
        if (size := path.stat().st_size) != expected:
            raise ValueError(f"checkpoint file {path} is damaged: it has {size} bytes and {MANIFEST} says {expected}")

    def _check_header(self, name: str, items: list[ReadItem]) -> None:
        with open_shard(self.path / name) as file:
            keys = set(file.keys())
            for item in items:
                chunk = self.stored[item.storage_index]
                said = (self.manifest.tensors[item.storage_index.fqn].dtype, chunk.sizes)
                view = file.get_slice(chunk.key) if chunk.key in keys else None
                if view is None or (view.get_dtype(), tuple(view.get_shape())) != said:
                    raise ValueError(f"checkpoint file {self.path / name} does not hold {chunk.key!r} as {MANIFEST} says: {said}")


class Stored(NamedTuple):
    """Where one rectangle was written."""

    file: str
    key: str
    record: FileRecord


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _tensor_records(metadata: Metadata, stored: dict[MetadataIndex, Stored]) -> dict[str, TensorRecord]:
    records = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        chunks = []
        for chunk in tensor.chunks:
            place = stored[MetadataIndex(name, chunk.offsets)]
            chunks.append(ChunkRecord(tuple(chunk.offsets), tuple(chunk.sizes), place.file, place.key))
        records[name] = TensorRecord(CODES[tensor.properties.dtype], tuple(tensor.size), chunks)
    return records


def _metadata(record: TensorRecord) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in record.chunks]
    return TensorStorageMetadata(TensorProperties(dtype=DTYPES[record.dtype]), torch.Size(record.shape), chunks)


def _beside(path: Path, tag: str) -> Path:
    return path.with_name(f"{path.name}{tag}{secrets.token_hex(4)}")


def _give_name(temporary: Path, final: Path) -> None:
    """Rename the complete folder `temporary` to `final`. A folder of that name is set aside first and removed last."""
    old = _beside(final, REPLACED) if final.exists() else None
    if old:
        final.rename(old)
    try:
        temporary.rename(final)
    except BaseException:
        if old:
            old.rename(final)
        raise
    sync_folder(final.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)
