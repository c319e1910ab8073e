"""Reads any rectangle of a checkpoint's tensors, from whichever files hold parts of it; no more than that is in memory."""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..parallel.shard import LocalShard, ShardMetadata, whole
from .manifest import PREFIX, Manifest
from .safetensors_file import DTYPES, open_safetensors, read_rectangle
from .tensor_groups import ChunkRecord, TensorRecord

Reads = dict[str, list[tuple[ChunkRecord, LocalShard]]]
"""By file: its chunks that overlap a shard, each with that shard."""


def reads_by_file(tensors: Mapping[str, TensorRecord], shards: dict[str, LocalShard]) -> Reads:
    """Returns what must be read to fill `shards`; each of their names is in `tensors`."""
    reads: Reads = defaultdict(list)
    for name, shard in shards.items():
        for chunk in tensors[name].overlapping(shard.metadata):
            reads[chunk.file].append((chunk, shard))
    return dict(reads)


def fill_shards(folder: Path, reads: Reads) -> None:
    """Copies the chunks into the tensors of the shards, in place, one file after the other."""
    for name, pairs in reads.items():
        with open_safetensors(folder / name) as file:
            for chunk, shard in pairs:
                copy_overlap(file, chunk, shard)


class TensorReader:
    """The tensors of the checkpoint `folder`. A context: files, and the pages that were read from them, stay open until its end."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorRecord]) -> None:
        self.folder, self.tensors = folder, tensors
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._files.clear()

    def read(self, name: str, metadata: ShardMetadata | None = None) -> Tensor:
        """Returns the rectangle `metadata` of the tensor `name`; by default the whole tensor."""
        record = self.tensors[name]
        metadata = whole(record.shape) if metadata is None else metadata
        shard = LocalShard(metadata, torch.empty(metadata.sizes, dtype=DTYPES[record.dtype]))
        for file, pairs in reads_by_file({name: record}, {name: shard}).items():
            if file not in self._files:
                self._files[file] = self._stack.enter_context(open_safetensors(self.folder / file))
            for chunk, _ in pairs:
                copy_overlap(self._files[file], chunk, shard)
        return shard.tensor


def overlap(one: ShardMetadata, other: ShardMetadata) -> ShardMetadata | None:
    """Returns the rectangle that two rectangles of a tensor have in common; None if they share no element."""
    offsets = tuple(map(max, one.offsets, other.offsets))
    ends = [min(a + p, b + q) for a, p, b, q in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)]
    sizes = tuple(end - begin for begin, end in zip(offsets, ends, strict=True))
    return ShardMetadata(one.shape, offsets, sizes) if all(size > 0 for size in sizes) else None


def copy_overlap(file: Any, chunk: ChunkRecord, shard: LocalShard) -> None:
    """Copies from the open `file` what the chunk and the shard have in common into the shard's tensor."""
    metadata, tensor = shard
    common = overlap(chunk.metadata, metadata)
    assert common is not None
    within(metadata, common).cut(tensor.detach()).copy_(read_rectangle(file, chunk.key, within(chunk.metadata, common)))


def within(outer: ShardMetadata, inner: ShardMetadata) -> ShardMetadata:
    """Returns `inner` as a rectangle of the tensor that `outer` is stored as."""
    return ShardMetadata(outer.sizes, tuple(a - b for a, b in zip(inner.offsets, outer.offsets, strict=True)), inner.sizes)


def weights_on_meta(manifest: Manifest) -> dict[str, Tensor]:
    """Returns the model's tensors by name, in their stored dtypes, on the meta device."""
    return {
        name.removeprefix(PREFIX): torch.empty(record.shape, dtype=DTYPES[record.dtype], device="meta")
        for name, record in manifest.tensors.items()
        if name.startswith(PREFIX)
    }
