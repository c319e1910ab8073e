"""Which rank writes which rectangle of which tensor. Rank 0 decides from the shards of all ranks, once while they stay the same."""

import math
from collections import defaultdict
from itertools import chain
from typing import NamedTuple

import torch

from ..parallel.shard import LocalShard, ShardMetadata, disjoint
from .expert_hashes import ExpertSlice, split_slices
from .manifest import ITEM_BYTES, ChunkRecord, TensorRecord
from .safetensors_file import CODES, DTYPES


class NamedShard(NamedTuple):
    """A rank's shard of a tensor, without the values."""

    name: str
    dtype: str
    """safetensors' code."""
    metadata: ShardMetadata

    @property
    def bytes(self) -> int:
        return math.prod(self.metadata.sizes) * ITEM_BYTES[self.dtype]


class SavePlan(NamedTuple):
    """The part of one rank in a save."""

    names: list[str]
    """Tensors whose local shard this rank writes into its file."""
    slices: list[ExpertSlice]
    """Expert slices that are split over files and that this rank reads back and hashes once all files are written."""
    tensors: dict[str, TensorRecord]
    """The records that `slices` needs; for rank 0, which writes the manifest, those of every tensor."""
    hashing_ranks: int
    """Ranks below this number have slices to hash."""
    bytes: int
    """Written by all ranks together."""


def file_of_rank(rank: int) -> str:
    """Returns the name of the file that a rank writes."""
    return f"shard_{rank:05d}.safetensors"


def named_shards(shards: dict[str, LocalShard]) -> list[NamedShard]:
    """Returns what a rank tells rank 0 of its shards. Raises ValueError for a shard that cannot be saved."""
    named = []
    for name, shard in shards.items():
        check_shard(name, shard)
        metadata, tensor = shard
        if tensor.dtype not in CODES:
            known = ", ".join(map(dtype_name, CODES))
            raise ValueError(f"tensor {name!r}: dtype {dtype_name(tensor.dtype)} cannot be saved; these can: {known}")
        named.append(NamedShard(name, CODES[tensor.dtype], ShardMetadata(*map(tuple, metadata))))
    return named


def make_save_plans(shards: list[list[NamedShard]]) -> list[SavePlan]:
    """Returns the plan of each rank from the shards of each rank.

    Each rectangle is written once, by one of the ranks that hold it, such that all ranks write about the same number of bytes.
    Raises ValueError for shards that do not make up their tensor.
    """
    tensors = _empty_records(shards)
    names: list[list[str]] = [[] for _ in shards]
    for shard, rank in _writers(shards).items():
        names[rank].append(shard.name)
        # A rank holds at most one shard of a tensor, so the tensor's name is a unique key in the rank's file.
        tensors[shard.name].chunks.append(ChunkRecord(shard.metadata, file_of_rank(rank), shard.name))
    for name, record in tensors.items():
        record.chunks.sort(key=lambda chunk: chunk.metadata.offsets)
        _check_tiling(name, record)
    total = sum(math.prod(record.shape) * ITEM_BYTES[record.dtype] for record in tensors.values())
    split = split_slices(tensors)
    plans = []
    for rank, own in enumerate(names):
        slices = split[rank :: len(names)]
        known = tensors if rank == 0 else {one.tensor: tensors[one.tensor] for one in slices}
        plans.append(SavePlan(sorted(own), slices, known, min(len(split), len(names)), total))
    return plans


def check_shard(name: str, shard: LocalShard) -> None:
    """Raises ValueError if the tensor has not the sizes of its metadata, or the rectangle is not inside of the global shape."""
    metadata, tensor = shard
    if tuple(tensor.shape) != tuple(metadata.sizes):
        sizes = tuple(metadata.sizes)
        raise ValueError(f"tensor {name!r}: the local shape {tuple(tensor.shape)} must be the shard's sizes {sizes}")
    rectangle = [(offset, offset + size) for offset, size in zip(metadata.offsets, metadata.sizes, strict=True)]
    if any(begin < 0 or end > extent for (begin, end), extent in zip(rectangle, metadata.shape, strict=True)):
        text = ", ".join(f"{begin}:{end}" for begin, end in rectangle)
        raise ValueError(f"tensor {name!r}: [{text}] must lie inside of the shape {tuple(metadata.shape)}")


def dtype_name(dtype: torch.dtype) -> str:
    """Returns "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _empty_records(shards: list[list[NamedShard]]) -> dict[str, TensorRecord]:
    """Returns a record without chunks for each tensor. Raises ValueError if two ranks give it another shape or dtype."""
    tensors: dict[str, TensorRecord] = {}
    for name, dtype, metadata in chain(*shards):
        record = TensorRecord(dtype, metadata.shape, [])
        known = tensors.setdefault(name, record)
        if known[:2] != record[:2]:
            kinds = " and ".join(f"{dtype_name(DTYPES[one.dtype])} {one.shape}" for one in (known, record))
            raise ValueError(f"tensor {name!r}: shape and dtype must be the same on all ranks, not {kinds}")
    return tensors


def _writers(shards: list[list[NamedShard]]) -> dict[NamedShard, int]:
    """Returns the writer of each rectangle: largest first, the rank with the fewest bytes so far among those that hold it."""
    holders: dict[NamedShard, list[int]] = defaultdict(list)
    for rank, own in enumerate(shards):
        for shard in own:
            if shard.bytes:
                holders[shard].append(rank)
    load = [0] * len(shards)
    writer: dict[NamedShard, int] = {}
    # Shards that only one rank holds come first: they leave no choice, and their bytes count in the choices that follow.
    for shard in sorted(holders, key=lambda one: (len(holders[one]) > 1, -one.bytes)):
        writer[shard] = min(holders[shard], key=load.__getitem__)
        load[writer[shard]] += shard.bytes
    return writer


def _check_tiling(name: str, record: TensorRecord) -> None:
    """Raises ValueError unless the chunks cover each element of the tensor once."""
    if len(record.chunks) > 1 and not disjoint([chunk.metadata for chunk in record.chunks]):
        raise ValueError(f"tensor {name!r}: two ranks hold shards that overlap but differ; shards must be equal or apart")
    covered, total = sum(math.prod(chunk.metadata.sizes) for chunk in record.chunks), math.prod(record.shape)
    if covered != total:
        raise ValueError(f"tensor {name!r}: the ranks hold {covered} of its {total} elements; the shards must make up the whole")
