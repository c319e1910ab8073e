"""Who writes which rectangle of which tensor, and which saved rectangles make up a wanted one.

torch.distributed.checkpoint calls these planners in this order: each rank's local plan, the global plan on rank 0, then the data.
"""

import difflib
import io
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ...parallel.pieces import Held, Piece
from .shards import CODES


class HeldSavePlanner(SavePlanner):
    """Every rectangle is written once, by one of the ranks that hold it, so that the ranks write about the same number of bytes."""

    def set_up_planner(
        self, state_dict: dict[str, Held], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.held = state_dict

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(name, held) for name, held in self.held.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        tensors = _agreed_tensors(all_plans)
        writer = _writers(all_plans)
        plans = [
            replace(plan, items=[item for item in plan.items if writer.get(_rectangle(item)) == rank])
            for rank, plan in enumerate(all_plans)
        ]
        for item in _items(plans):
            tensors[item.index.fqn].chunks.append(_data(item).chunk)
        for name, tensor in tensors.items():
            _check_tiling(name, tensor)
        return plans, Metadata(dict(tensors))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self.held[write_item.index.fqn].tensor.detach()


class HeldLoadPlanner(LoadPlanner):
    """Reads each wanted piece from the saved rectangles that overlap it; refuses names, shapes and dtypes that differ."""

    def __init__(self, checkpoint: str, strict: bool):
        self.checkpoint = checkpoint
        self.strict = strict

    def set_up_planner(self, state_dict: dict[str, Held], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self.held = state_dict
        self.saved: dict[str, Any] = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items = [item for name, held in self.held.items() for item in self._reads(name, held)]
        # The names travel too: a rank that wants an empty piece wants the tensor, but reads nothing.
        return LoadPlan(items, planner_data=list(self.held))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        wanted = {name for plan in global_plan for name in plan.planner_data}
        extra = [name for name in self.saved if name not in wanted]
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
        return Piece(tuple(target.shape), tuple(read_item.dest_offsets), tuple(read_item.lengths)).cut(target)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do: `resolve_tensor` gave a view."""

    def _reads(self, name: str, held: Held) -> list[ReadItem]:
        if name not in self.saved:
            missing = [other for other in self.held if other not in self.saved]
            raise ValueError(
                f"checkpoint {self.checkpoint}: tensor {name!r}{_and_more(missing)} is in this run but not in the checkpoint: "
                f"the names must be the same{_nearest(name, self.saved)}"
            )
        saved = self.saved[name]
        _check_held(name, held)
        if (saved.size, saved.properties.dtype) != (held.piece.shape, held.tensor.dtype):
            raise ValueError(
                f"checkpoint {self.checkpoint}: tensor {name!r} is {_kind(saved.size, saved.properties.dtype)} in the checkpoint "
                f"and {_kind(held.piece.shape, held.tensor.dtype)} in this run: shape and dtype must be the same"
            )
        if held.tensor.numel() == 0:
            return []
        items = create_read_items_for_chunk_list(name, saved, [_chunk(held.piece)])
        if sum(math.prod(item.lengths) for item in items) != held.tensor.numel():
            raise ValueError(
                f"checkpoint {self.checkpoint}: tensor {name!r} is incomplete: no file holds all of {_span(held.piece)}"
            )
        return items


class Rectangle(NamedTuple):
    """Identifies what is to be written; replicas are equal."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def _write_item(name: str, held: Held) -> WriteItem:
    _check_held(name, held)
    piece, tensor = held
    if tensor.dtype not in CODES:
        raise ValueError(
            f"tensor {name!r}: dtype {_dtype(tensor.dtype)} cannot be saved; these can: {', '.join(map(_dtype, CODES))}"
        )
    data = TensorWriteData(_chunk(piece), TensorProperties(dtype=tensor.dtype), torch.Size(piece.shape))
    return WriteItem(MetadataIndex(name, piece.offsets), WriteItemType.SHARD, tensor_data=data)


def _check_held(name: str, held: Held) -> None:
    piece, tensor = held
    if tuple(tensor.shape) != tuple(piece.sizes):
        raise ValueError(f"tensor {name!r}: the local shape {tuple(tensor.shape)} must be the piece's sizes {tuple(piece.sizes)}")
    spans = zip(piece.shape, piece.offsets, piece.sizes, strict=True)
    if any(offset < 0 or offset + size > extent for extent, offset, size in spans):
        raise ValueError(f"tensor {name!r}: {_span(piece)} must lie inside of the shape {tuple(piece.shape)}")


def _agreed_tensors(all_plans: list[SavePlan]) -> dict[str, TensorStorageMetadata]:
    """Each tensor by name, without chunks yet; all ranks that hold a piece must mean the same tensor."""
    tensors: dict[str, TensorStorageMetadata] = {}
    for item in _items(all_plans):
        name, (_, properties, size) = item.index.fqn, (_data(item).chunk, _data(item).properties, _data(item).size)
        known = tensors.setdefault(name, TensorStorageMetadata(properties, size, []))
        if (known.size, known.properties.dtype) != (size, properties.dtype):
            kinds = f"{_kind(known.size, known.properties.dtype)} and {_kind(size, properties.dtype)}"
            raise ValueError(f"tensor {name!r}: shape and dtype must be the same on all ranks, not {kinds}")
    return tensors


def _writers(all_plans: list[SavePlan]) -> dict[Rectangle, int]:
    """The rank that writes each rectangle: largest first, to the rank with the fewest bytes so far among those that hold it."""
    holders: dict[Rectangle, list[int]] = defaultdict(list)
    size: dict[Rectangle, int] = {}
    for rank, plan in enumerate(all_plans):
        for item in plan.items:
            if count := math.prod(_data(item).chunk.sizes):
                holders[_rectangle(item)].append(rank)
                size[_rectangle(item)] = count * _data(item).properties.dtype.itemsize
    load = [0] * len(all_plans)
    writer: dict[Rectangle, int] = {}
    # What only one rank holds comes first: there is no choice, and it counts for the choices after it.
    for rectangle in sorted(holders, key=lambda one: (len(holders[one]) > 1, -size[one])):
        writer[rectangle] = min(holders[rectangle], key=load.__getitem__)
        load[writer[rectangle]] += size[rectangle]
    return writer


def _check_tiling(name: str, tensor: TensorStorageMetadata) -> None:
    """The chunks cover the tensor without overlap."""
    covered, total = sum(math.prod(chunk.sizes) for chunk in tensor.chunks), math.prod(tensor.size)
    # Each chunk overlaps itself; one pair more and two different chunks overlap.
    pairs = len(create_read_items_for_chunk_list(name, tensor, tensor.chunks))
    if pairs != len(tensor.chunks):
        raise ValueError(f"tensor {name!r}: two ranks hold pieces that overlap but differ; pieces must be equal or apart")
    if covered != total:
        raise ValueError(f"tensor {name!r}: the ranks hold {covered} of its {total} elements; the pieces must make up the whole")


def _items(plans: list[SavePlan]) -> Iterable[WriteItem]:
    return (item for plan in plans for item in plan.items)


def _data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None
    return item.tensor_data


def _rectangle(item: WriteItem) -> Rectangle:
    chunk = _data(item).chunk
    return Rectangle(item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes))


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(shape: Iterable[int], dtype: torch.dtype) -> str:
    return f"{_dtype(dtype)} {tuple(shape)}"


def _span(piece: Piece) -> str:
    return "[" + ", ".join(f"{offset}:{offset + size}" for offset, size in zip(piece.offsets, piece.sizes, strict=True)) + "]"


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; the nearest name there is {near[0]!r}" if near else ""
