"""Any rectangle of a checkpoint's tensors, from whatever files have parts of it; no more than that is in memory."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..parallel.shard import ShardMetadata
from .manifest import ChunkRecord, Manifest, TensorRecord
from .safetensors_file import DTYPES, open_shard, read_rectangle


class StoredTensors:
    """The tensors in `folder`. A context: files that were opened are closed at its end."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorRecord]) -> None:
        self.folder, self.tensors = folder, tensors
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "StoredTensors":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._files.clear()

    def read(self, name: str, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """`sizes` elements from `offsets` on; by default all."""
        record = self.tensors[name]
        offsets = [0] * len(record.shape) if offsets is None else offsets
        sizes = record.shape if sizes is None else sizes
        result = torch.empty(tuple(sizes), dtype=DTYPES[record.dtype])
        for chunk in record.chunks:
            self._fill(result, offsets, chunk)
        return result

    def _fill(self, result: torch.Tensor, offsets: Sequence[int], chunk: ChunkRecord) -> None:
        """Copy what the chunk has of it."""
        begins = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
        ends = [min(a + p, b + q) for a, p, b, q in zip(offsets, result.shape, chunk.offsets, chunk.sizes, strict=True)]
        if any(end <= begin for begin, end in zip(begins, ends, strict=True)):
            return
        sizes = [end - begin for begin, end in zip(begins, ends, strict=True)]
        there = [begin - base for begin, base in zip(begins, chunk.offsets, strict=True)]
        for dim, (begin, base, size) in enumerate(zip(begins, offsets, sizes, strict=True)):
            result = result.narrow(dim, begin - base, size)
        result.copy_(read_rectangle(self._open(chunk.file), chunk.key, there, sizes))

    def _open(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = self._stack.enter_context(open_shard(self.folder / name))
        return self._files[name]


# The tensors of a checkpoint of ours, one at a time.

PREFIX = "model."
"""Of the names of weights; the others are the optimizer's and the generators'."""


def weights_on_meta(manifest: Manifest) -> dict[str, Tensor]:
    """The model's tensors by name, as they are stored but on the meta device."""
    return {
        name.removeprefix(PREFIX): torch.empty(record.shape, dtype=DTYPES[record.dtype], device="meta")
        for name, record in manifest.tensors.items()
        if name.startswith(PREFIX)
    }


def read_weight(checkpoint: Path, manifest: Manifest, name: str) -> Tensor:
    """One whole tensor of the model, whatever pieces it is stored in."""
    record = manifest.tensors[PREFIX + name]
    tensor = torch.empty(record.shape, dtype=DTYPES[record.dtype])
    for chunk in record.chunks:
        with open_shard(checkpoint / chunk.file) as file:
            begin = (0,) * len(chunk.sizes)
            ShardMetadata(record.shape, chunk.offsets, chunk.sizes).cut(tensor).copy_(
                read_rectangle(file, chunk.key, begin, chunk.sizes)
            )
    return tensor
