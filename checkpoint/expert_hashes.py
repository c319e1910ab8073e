"""Who is who among the experts: a hash of each expert's weights and of both its moments, by layer and global expert id.

It does not depend on the layout. The slice of one expert of one tensor is hashed as its bytes, row-major, as if the tensor were
whole (xxh3-128). An expert's hash is the xxh3-128 of a line `NAME HASH` for each of its tensors, sorted by name. A slice that lies
in one file is hashed by the rank that writes it; one that is cut is read back from the files, by the ranks in turns.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from ..parallel.shard import ShardMetadata
from .manifest import ChunkRecord, TensorRecord
from .safetensors_file import content_of
from .tensor_reader import StoredTensors

EXPERT_TENSOR = re.compile(r"(?:model|optimizer)\.(?P<layer>.+\.experts)\.(?P<name>[^.]+?)(?:\.(?P<moment>exp_avg|exp_avg_sq))?")
"""A tensor whose dimension 0 is the global expert id: model.layers.0.moe.experts.down, optimizer.[the same].exp_avg."""
WEIGHTS = "weights"
Hashes = dict[str, dict[Any, str]]
"""Of slices: by tensor and expert (an int, or its digits)."""


class Slice(NamedTuple):
    """One expert of one tensor, which is one rectangle of the tensor."""

    tensor: str
    expert: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def slices(name: str, shape: tuple[int, ...]) -> list[Slice]:
    """The experts of the tensor `name`; none if it is no tensor of experts."""
    if not EXPERT_TENSOR.fullmatch(name) or 0 in shape:
        return []
    rest = tuple(shape[1:])
    return [Slice(name, expert, (expert, *[0] * len(rest)), (1, *rest)) for expert in range(shape[0])]


def cut_slices(tensors: Mapping[str, TensorRecord]) -> list[Slice]:
    """Those that no single chunk holds."""
    return [one for name, record in tensors.items() for one in slices(name, record.shape) if not _in_one(one, record.chunks)]


def hash_held(name: str, piece: ShardMetadata, content: memoryview) -> dict[int, str]:
    """Of the slices that a rank's piece holds whole: `content` is its bytes, row-major."""
    if not EXPERT_TENSOR.fullmatch(name) or tuple(piece.sizes[1:]) != tuple(piece.shape[1:]) or 0 in piece.sizes:
        return {}
    first, rows = piece.offsets[0], piece.sizes[0]
    step = len(content) // rows
    return {first + row: xxhash.xxh3_128_hexdigest(content[row * step : (row + 1) * step]) for row in range(rows)}


def hash_stored(folder: Path, tensors: Mapping[str, TensorRecord], wanted: Iterable[Slice], go_on: Callable[[], None]) -> Hashes:
    """Of slices read from the files in `folder`, one at a time in memory. `go_on` is called before each: it may raise."""
    hashes: Hashes = defaultdict(dict)
    with StoredTensors(folder, tensors) as stored:
        for one in wanted:
            go_on()
            hashes[one.tensor][one.expert] = xxhash.xxh3_128_hexdigest(content_of(stored.read(one.tensor, one.offsets, one.sizes)))
    return dict(hashes)


def expert_hashes(hashes: Iterable[Hashes]) -> dict[str, dict[str, list[str]]]:
    """By layer and kind (weights, exp_avg, exp_avg_sq): one hash for each expert, in the order of their ids."""
    parts: dict[tuple[str, str], dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for each in hashes:
        for tensor, by_expert in each.items():
            match = EXPERT_TENSOR.fullmatch(tensor)
            assert match is not None
            for expert, digest in by_expert.items():
                parts[match["layer"], match["moment"] or WEIGHTS][int(expert)][match["name"]] = digest
    found: dict[str, dict[str, list[str]]] = {}
    for (layer, kind), experts in sorted(parts.items()):
        found.setdefault(layer, {})[kind] = [_together(experts[expert]) for expert in range(len(experts))]
    return found


def _together(digests: dict[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode())


def _in_one(one: Slice, chunks: list[ChunkRecord]) -> bool:
    return any(
        chunk.offsets[0] <= one.expert < chunk.offsets[0] + chunk.sizes[0] and chunk.sizes[1:] == one.sizes[1:] for chunk in chunks
    )
