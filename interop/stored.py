"""The tensors of a checkpoint of ours, one at a time."""

from pathlib import Path

import torch
from torch import Tensor

from ..parallel.shard import Piece
from ..train.checkpoint.manifest import Manifest
from ..train.checkpoint.shards import DTYPES, open_shard, read_rectangle

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
            Piece(record.shape, chunk.offsets, chunk.sizes).cut(tensor).copy_(read_rectangle(file, chunk.key, begin, chunk.sizes))
    return tensor
