"""Safetensors files as Hugging Face has them: model-00001-of-00003.safetensors and an index, written one tensor after the other."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .folder import DTYPES, INDEX
from .names import Part

SHARD_BYTES = 5_000_000_000
"""A file is not larger, unless one tensor is."""
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Output(NamedTuple):
    """A tensor to write: the part `part` of our tensor `ours`, as `dtype`."""

    ours: str
    part: Part
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(folder: Path, outputs: dict[str, Output], read: Callable[[str], Tensor], shard_bytes: int) -> list[str]:
    """Write all `outputs`, by their names, and the index. `read` gives a tensor of ours; one at a time is kept. Gives the files."""
    shards = _cut(outputs, shard_bytes)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    current: dict[str, Tensor] = {}
    for file, names in zip(files, shards, strict=True):
        with (folder / file).open("xb") as stream:
            stream.write(_header({name: outputs[name] for name in names}))
            for name in names:
                stream.write(_bytes(outputs[name], read, current))
    index = {
        "metadata": {"total_size": sum(output.bytes for output in outputs.values())},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in sorted(names)},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return files


def _cut(outputs: dict[str, Output], shard_bytes: int) -> list[list[str]]:
    """Names by file. Widest elements first, so that each tensor begins at a multiple of its element's size."""
    shards: list[list[str]] = []
    room = 0
    for name in sorted(outputs, key=lambda name: -outputs[name].dtype.itemsize):
        if not shards or outputs[name].bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= outputs[name].bytes
    return shards


def _header(outputs: dict[str, Output]) -> bytes:
    """The length of the JSON in 8 bytes, and the JSON."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, output in outputs.items():
        begin, end = end, end + output.bytes
        header[name] = {"dtype": CODES[output.dtype], "shape": output.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(output: Output, read: Callable[[str], Tensor], current: dict[str, Tensor]) -> memoryview:
    """The bytes of one tensor. Neighbours are often parts of the same tensor of ours, so that one stays in `current`."""
    if output.ours not in current:
        current.clear()
        current[output.ours] = read(output.ours)
    theirs = output.part.written(current[output.ours]).to(output.dtype).contiguous()
    return theirs.reshape(-1).view(torch.uint8).numpy().data
