"""The tensors of a checkpoint of ours, one at a time."""

from pathlib import Path

import torch
from torch import Tensor

from ..parallel.pieces import Piece
from ..train.checkpoint.manifest import MANIFEST, Manifest
from ..train.checkpoint.shards import DTYPES, hash_file, open_shard, read_rectangle
from ..train.checkpoint.store import newest_checkpoint

PREFIX = "model."
"""Of the names of weights; the others are the optimizer's and the generators'."""


def find_checkpoint(path: Path) -> Path:
    """`path` itself, or the newest checkpoint in it. ValueError if there is none."""
    inside = newest_checkpoint(path / "checkpoints") or newest_checkpoint(path)
    if inside is None and not (path / MANIFEST).is_file():
        raise ValueError(f"{path}: is neither a checkpoint nor a run folder with one")
    return inside or path


def verify(checkpoint: Path, manifest: Manifest) -> None:
    """ValueError for the first file that does not hold what the manifest says."""
    for name, record in manifest.files.items():
        if not (checkpoint / name).is_file() or hash_file(checkpoint / name) != record.hash:
            raise ValueError(f"checkpoint file {checkpoint / name} is missing or damaged")


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
