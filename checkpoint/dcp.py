"""Where planned rectangles come from: a folder of safetensors files and one manifest."""

import difflib
import io
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
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
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ..parallel.shard import LocalShard, ShardMetadata
from .manifest import ChunkRecord, Manifest, TensorRecord, check_sizes
from .safetensors_file import DTYPES, open_shard, read_rectangle
from .save_plan import check_held, dtype_name, span
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


# Which saved rectangles make up a wanted one.
#
# torch.distributed.checkpoint calls the planner in this order: each rank's local plan, the global plan on rank 0, then the
# data.


class HeldLoadPlanner(LoadPlanner):
    """Reads each wanted piece from the saved rectangles that overlap it; refuses names, shapes and dtypes that differ."""

    def __init__(self, checkpoint: str, strict: bool, optional: str | None = None):
        self.checkpoint = checkpoint
        self.strict = strict
        self.optional = optional

    def set_up_planner(
        self, state_dict: dict[str, LocalShard], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self.held = state_dict
        self.saved: dict[str, Any] = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items = [item for name, held in self.held.items() for item in self._reads(name, held)]
        # The names travel too: a rank that wants an empty piece wants the tensor, but reads nothing.
        return LoadPlan(items, planner_data=list(self.held))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        wanted = {name for plan in global_plan for name in plan.planner_data}
        extra = [name for name in self.saved if name not in wanted and not (self.optional and name.startswith(self.optional))]
        if self.strict and extra:
            raise ValueError(
                f"checkpoint {self.checkpoint}: tensor {extra[0]!r}{_and_more(extra)} is in the checkpoint but not in this run: "
                f"the names must be the same{_nearest(extra[0], wanted)}"
            )
        return [replace(plan, planner_data=None) for plan in global_plan]

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("a checkpoint holds tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target = self.held[read_item.dest_index.fqn].tensor.detach()
        return ShardMetadata(tuple(target.shape), tuple(read_item.dest_offsets), tuple(read_item.lengths)).cut(target)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do: `resolve_tensor` gave a view."""

    def _reads(self, name: str, held: LocalShard) -> list[ReadItem]:
        if name not in self.saved:
            missing = [other for other in self.held if other not in self.saved]
            raise ValueError(
                f"checkpoint {self.checkpoint}: tensor {name!r}{_and_more(missing)} is in this run but not in the checkpoint: "
                f"the names must be the same{_nearest(name, self.saved)}"
            )
        saved = self.saved[name]
        check_held(name, held)
        if (saved.size, saved.properties.dtype) != (held.metadata.shape, held.tensor.dtype):
            raise ValueError(
                f"checkpoint {self.checkpoint}: tensor {name!r} is {_kind(saved.size, saved.properties.dtype)} in the checkpoint "
                f"and {_kind(held.metadata.shape, held.tensor.dtype)} in this run: shape and dtype must be the same"
            )
        if held.tensor.numel() == 0:
            return []
        items = create_read_items_for_chunk_list(name, saved, [_chunk(held.metadata)])
        if sum(math.prod(item.lengths) for item in items) != held.tensor.numel():
            raise ValueError(
                f"checkpoint {self.checkpoint}: tensor {name!r} is incomplete: no file holds all of {span(held.metadata)}"
            )
        return items


def _chunk(piece: ShardMetadata) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))


def _kind(shape: Iterable[int], dtype: torch.dtype) -> str:
    return f"{dtype_name(dtype)} {tuple(shape)}"


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; the nearest name there is {near[0]!r}" if near else ""
