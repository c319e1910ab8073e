"""Hashes of each expert's weights and of both its moments, by layer and global expert id, whatever the layout.

The slice of one expert of one tensor is hashed as its bytes, row-major, as if the tensor were whole (xxh3-128). An expert's hash is
the xxh3-128 of a line `NAME HASH` for each of its tensors, sorted by name. A slice that lies in one file is hashed by the rank that
writes it; one that is split over files is read back from them, by the ranks in turn.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from ..parallel.shard import ShardMetadata
from .manifest import TensorRecord
from .safetensors_file import content_of
from .tensor_reader import TensorReader

EXPERT_TENSOR = re.compile(r"(?:model|optimizer)\.(?P<layer>.+\.experts)\.(?P<name>[^.]+?)(?:\.(?P<moment>exp_avg|exp_avg_sq))?")
"""A tensor whose dimension 0 is the global expert id: model.layers.0.moe.experts.down, optimizer.[the same].exp_avg."""
WEIGHTS = "weights"
SliceHashes = dict[str, dict[Any, str]]
"""By tensor and expert (an int, or its digits once it was JSON)."""


class ExpertSlice(NamedTuple):
    """One expert of one tensor."""

    tensor: str
    expert: int
    metadata: ShardMetadata


def expert_slices(name: str, shape: tuple[int, ...]) -> list[ExpertSlice]:
    """Returns the experts of the tensor `name`; none if it is not a tensor of experts."""
    if not EXPERT_TENSOR.fullmatch(name) or 0 in shape:
        return []
    begin, sizes = (0,) * len(shape[1:]), (1, *shape[1:])
    return [ExpertSlice(name, expert, ShardMetadata(shape, (expert, *begin), sizes)) for expert in range(shape[0])]


def split_slices(tensors: Mapping[str, TensorRecord]) -> list[ExpertSlice]:
    """Returns the slices that no single chunk holds whole."""

    def held(one: ExpertSlice, chunk: ShardMetadata) -> bool:
        return chunk.offsets[0] <= one.expert < chunk.offsets[0] + chunk.sizes[0] and chunk.sizes[1:] == one.metadata.sizes[1:]

    return [
        one
        for name, record in tensors.items()
        for one in expert_slices(name, record.shape)
        if not any(held(one, chunk.metadata) for chunk in record.chunks)
    ]


def hash_whole_slices(name: str, metadata: ShardMetadata, content: memoryview) -> dict[int, str]:
    """Returns by expert the hashes of the slices that a shard holds whole. `content`: the shard's bytes, row-major."""
    if not EXPERT_TENSOR.fullmatch(name) or tuple(metadata.sizes[1:]) != tuple(metadata.shape[1:]) or 0 in metadata.sizes:
        return {}
    first, rows = metadata.offsets[0], metadata.sizes[0]
    step = len(content) // rows
    return {first + row: xxhash.xxh3_128_hexdigest(content[row * step : (row + 1) * step]) for row in range(rows)}


def hash_stored_slices(
    folder: Path, tensors: Mapping[str, TensorRecord], slices: Iterable[ExpertSlice], check: Callable[[], None]
) -> SliceHashes:
    """Hashes of slices read from the files in `folder`, one at a time in memory. `check` is called before each: it may raise."""
    hashes: SliceHashes = defaultdict(dict)
    with TensorReader(folder, tensors) as reader:
        for tensor, expert, metadata in slices:
            check()
            hashes[tensor][expert] = xxhash.xxh3_128_hexdigest(content_of(reader.read(tensor, metadata)))
    return dict(hashes)


def expert_hashes(hashes: Iterable[SliceHashes]) -> dict[str, dict[str, list[str]]]:
    """Returns by layer and kind (weights, exp_avg, exp_avg_sq) one hash for each expert, in the order of their ids."""
    parts: dict[tuple[str, str], dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for each in hashes:
        for tensor, by_expert in each.items():
            match = EXPERT_TENSOR.fullmatch(tensor)
            assert match is not None
            for expert, digest in by_expert.items():
                parts[match["layer"], match["moment"] or WEIGHTS][int(expert)][match["name"]] = digest
    found: dict[str, dict[str, list[str]]] = {}
    for (layer, kind), experts in sorted(parts.items()):
        texts = [
            "".join(f"{name} {digest}\n" for name, digest in sorted(experts[expert].items())) for expert in range(len(experts))
        ]
        found.setdefault(layer, {})[kind] = [xxhash.xxh3_128_hexdigest(text.encode()) for text in texts]
    return found
