"""Hashes of each expert's weights and of both its moments, by layer and global expert id, whatever the layout.

A hash is a sum, so each rank adds up the elements that it writes, while it writes them, and rank 0 adds the sums of all ranks:
nothing is read again, however the tensors are cut. An element adds, modulo 2^64,

    bits * W(name) * w_1(i_1) * w_2(i_2) * ...

bits: its bytes as a little-endian unsigned number. i_d: its index in dimension d of the tensor, of which dimension 0 is the expert.
w_d(i) = SplitMix64(i + d * 2^32) | 1, and W(name) = xxh3-64(name) | 1. Odd factors make each change of one element change the sum
(multilinear hashing, as in Lemire and Kaser, arXiv 1202.4961, with a product of weights for each position).
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

from ..parallel.shard import ShardMetadata
from .safetensors_file import content_of, open_safetensors, read_rectangle
from .tensor_groups import ChunkRecord, TensorRecord

EXPERT_TENSOR = re.compile(r"(?:model|optimizer)\.(?P<layer>.+\.experts)\.(?P<name>[^.]+?)(?:\.(?P<moment>exp_avg|exp_avg_sq))?")
"""A tensor whose dimension 0 is the global expert id: model.layers.0.moe.experts.down, optimizer.[the same].exp_avg."""
WEIGHTS = "weights"
BLOCK_ELEMENTS = 1 << 16
"""Elements that are widened at a time: half a megabyte, which stays in a cache."""
MASK = (1 << 64) - 1


class ExpertSums:
    """Sums by layer, kind (weights, exp_avg, exp_avg_sq) and expert, of the rectangles that were added so far."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(int)))
        """The experts are decimal digits, as they are once they were JSON."""

    def add(self, name: str, metadata: ShardMetadata, content: memoryview) -> None:
        """Adds a rectangle of the tensor `name`, unless it is no tensor of experts. `content`: its bytes, row-major."""
        match = EXPERT_TENSOR.fullmatch(name)
        if match is None or 0 in metadata.sizes:
            return
        sums = self.sums[match["layer"]][match["moment"] or WEIGHTS]
        factor = xxhash.xxh3_64_intdigest(match["name"].encode()) | 1
        dtype = f"<u{len(content) // math.prod(metadata.sizes)}"
        elements = np.frombuffer(content, dtype).reshape(metadata.sizes[0], -1)
        for row, expert in enumerate(range(metadata.offsets[0], metadata.offsets[0] + metadata.sizes[0])):
            sums[str(expert)] = (sums[str(expert)] + factor * _weighted_sum(elements[row], metadata)) & MASK

    def merge(self, other: Mapping[str, Mapping[str, Mapping[str, int]]]) -> None:
        """Adds the sums of other rectangles."""
        for layer, kinds in other.items():
            for kind, experts in kinds.items():
                sums = self.sums[layer][kind]
                for expert, value in experts.items():
                    sums[expert] = (sums[expert] + value) & MASK

    def hashes(self) -> dict[str, dict[str, list[str]]]:
        """Returns by layer and kind one hash (16 hexadecimal digits) for each expert, in the order of their ids."""
        return {
            layer: {
                kind: [f"{experts.get(str(expert), 0):016x}" for expert in range(1 + max(map(int, experts)))]
                for kind, experts in sorted(kinds.items())
            }
            for layer, kinds in sorted(self.sums.items())
        }


def stored_hashes(folder: Path, tensors: Mapping[str, TensorRecord]) -> dict[str, dict[str, list[str]]]:
    """Returns the hashes of the experts in `folder`; a part of one expert is in memory at a time."""
    by_file: dict[str, list[tuple[str, ChunkRecord]]] = defaultdict(list)
    for name, record in tensors.items():
        for chunk in record.chunks if EXPERT_TENSOR.fullmatch(name) else ():
            by_file[chunk.file].append((name, chunk))
    found = ExpertSums()
    for file, chunks in by_file.items():
        with open_safetensors(folder / file) as opened:
            for name, (metadata, _, key) in chunks:
                for place in range(metadata.sizes[0]):
                    shape, offsets, sizes = metadata.sizes, (place, *[0] * (len(metadata.sizes) - 1)), (1, *metadata.sizes[1:])
                    content = content_of(read_rectangle(opened, key, ShardMetadata(shape, offsets, sizes)))
                    first = (metadata.offsets[0] + place, *metadata.offsets[1:])
                    found.add(name, ShardMetadata(metadata.shape, first, sizes), content)
    return found.hashes()


def _weighted_sum(elements: np.ndarray, metadata: ShardMetadata) -> int:
    """Returns the sum of one expert's elements, each times the weights of its place. `elements`: flat, of a rectangle."""
    spans = list(zip(metadata.offsets, metadata.sizes, strict=True))
    for dim in range(len(spans) - 1, 0, -1):
        offset, size = spans[dim]
        elements = _sum_of_rows(elements.reshape(-1, size), _weights(dim, offset + size)[offset:])
    return int(elements.astype(np.uint64).reshape(()))


def _sum_of_rows(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns for each row the sum of its elements times `weights`."""
    sums = np.empty(len(rows), np.uint64)
    step = max(1, BLOCK_ELEMENTS // rows.shape[1])
    for begin in range(0, len(rows), step):
        np.einsum("ij,j->i", rows[begin : begin + step].astype(np.uint64), weights, out=sums[begin : begin + step])
    return sums


@functools.lru_cache(maxsize=64)
def _weights(dim: int, extent: int) -> np.ndarray:
    """Returns w_dim(0), ..., w_dim(extent - 1)."""
    x = np.arange(extent, dtype=np.uint64) + np.uint64(dim << 32) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)
