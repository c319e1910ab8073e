"""Which tensors of two checkpoints differ, and by how much, whatever their layouts; one block of rows is in memory at a time."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..parallel.shard import ShardMetadata, whole
from .expert_hashes import EXPERT_TENSOR
from .manifest import check_sizes, read_manifest
from .safetensors_file import content_of
from .tensor_groups import ITEM_BYTES, TensorRecord
from .tensor_reader import TensorReader

BLOCK_BYTES = 1 << 26


class TensorDifference(NamedTuple):
    """A tensor that is not the same bit for bit."""

    name: str
    what: str
    """only in A, only in B, shape, dtype or values."""
    largest: float | None = None
    """Absolute difference."""
    relative: float | None = None
    """Norm of the difference over the norm of the tensor in A."""
    experts: tuple[int, ...] = ()
    """Global ids of the experts that differ, in a tensor of experts."""


def diff(one: Path, other: Path) -> list[TensorDifference]:
    """Returns the differences in the order of names.

    Raises DamagedCheckpoint if a manifest cannot be read; the files are not verified.
    """
    a, b = read_manifest(one), read_manifest(other)
    check_sizes(one, a)  # before memory is allocated
    check_sizes(other, b)
    found = []
    with TensorReader(one, a.tensors) as ours, TensorReader(other, b.tensors) as theirs:
        for name in sorted(a.tensors.keys() | b.tensors.keys()):
            if name not in b.tensors or name not in a.tensors:
                found.append(TensorDifference(name, "only in A" if name in a.tensors else "only in B"))
                continue
            x, y = a.tensors[name], b.tensors[name]
            if x.shape != y.shape:
                found.append(TensorDifference(name, f"shape {x.shape} and {y.shape}"))
            elif x.dtype != y.dtype:
                found.append(TensorDifference(name, f"dtype {x.dtype} and {y.dtype}"))
            elif x.chunks == y.chunks and all(a.files[chunk.file] == b.files[chunk.file] for chunk in x.chunks):
                continue  # cut alike into files of the same bytes: nothing has to be read
            elif (difference := _values(name, ours, theirs)) is not None:
                found.append(difference)
    return found


def _values(name: str, ours: TensorReader, theirs: TensorReader) -> TensorDifference | None:
    """Returns None if all bits are the same."""
    experts, largest, squares, norm = [], 0.0, 0.0, 0.0
    differs = False
    for block in _blocks(name, ours.tensors[name]):
        x, y = ours.read(name, block), theirs.read(name, block)
        wide_x = x.double()
        norm += wide_x.square().sum().item()
        if content_of(x) == content_of(y):
            continue
        differs = True
        distance = wide_x - y.double()
        largest = max(largest, distance.abs().max().item(), key=lambda value: math.inf if math.isnan(value) else value)
        squares += distance.square().sum().item()
        if EXPERT_TENSOR.fullmatch(name):
            experts.append(block.offsets[0])
    if not differs:
        return None
    relative = math.sqrt(squares / norm) if norm > 0 and not math.isnan(squares) else math.inf if squares else 0.0
    return TensorDifference(name, "values", largest, relative, tuple(experts))


def _blocks(name: str, record: TensorRecord) -> Iterator[ShardMetadata]:
    """Yields the tensor in blocks of rows of bounded size; a tensor of experts in single experts."""
    shape = record.shape
    if not shape or 0 in shape:
        yield whole(shape)
        return
    row = math.prod(shape[1:]) * ITEM_BYTES[record.dtype]
    rows = 1 if EXPERT_TENSOR.fullmatch(name) else max(1, BLOCK_BYTES // row)
    for begin in range(0, shape[0], rows):
        yield ShardMetadata(shape, (begin, *[0] * (len(shape) - 1)), (min(rows, shape[0] - begin), *shape[1:]))
