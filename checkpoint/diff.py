"""Which tensors of two checkpoints differ, and by how much; from any layouts, a block of rows in memory at a time."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .expert_hashes import EXPERT_TENSOR
from .manifest import ITEM_BYTES, Manifest, TensorRecord, check_sizes, read_manifest
from .safetensors_file import content_of
from .tensor_reader import StoredTensors

BLOCK_BYTES = 1 << 26


class TensorDifference(NamedTuple):
    """Of one tensor that is not the same bit for bit."""

    name: str
    what: str
    """only in A, only in B, shape, dtype or values."""
    largest: float | None = None
    """Of the absolute differences."""
    relative: float | None = None
    """The norm of the difference over the norm of the tensor in A."""
    experts: tuple[int, ...] = ()
    """Global ids of those that differ, of a tensor of experts."""


def diff(one: Path, other: Path) -> list[TensorDifference]:
    """In the order of names. DamagedCheckpoint if a manifest cannot be read; use `verify` to know about the files."""
    a, b = read_manifest(one), read_manifest(other)
    check_sizes(one, a)  # before memory is asked for
    check_sizes(other, b)
    found = []
    with StoredTensors(one, a.tensors) as ours, StoredTensors(other, b.tensors) as theirs:
        for name in sorted(a.tensors.keys() | b.tensors.keys()):
            if name not in b.tensors or name not in a.tensors:
                found.append(TensorDifference(name, "only in A" if name in a.tensors else "only in B"))
            elif (what := _kind(a.tensors[name], b.tensors[name])) is not None:
                found.append(TensorDifference(name, what))
            elif not _same_files(name, a, b) and (difference := _values(name, ours, theirs)) is not None:
                found.append(difference)
    return found


def _kind(one: TensorRecord, other: TensorRecord) -> str | None:
    if one.shape != other.shape:
        return f"shape {one.shape} and {other.shape}"
    return f"dtype {one.dtype} and {other.dtype}" if one.dtype != other.dtype else None


def _same_files(name: str, a: Manifest, b: Manifest) -> bool:
    """Cut alike into files of the same bytes: nothing needs to be read."""
    ours, theirs = a.tensors[name].chunks, b.tensors[name].chunks
    return ours == theirs and all(a.files[chunk.file] == b.files[chunk.file] for chunk in ours)


def _values(name: str, ours: StoredTensors, theirs: StoredTensors) -> TensorDifference | None:
    """None if all bits are the same."""
    experts, largest, squares, norm = [], 0.0, 0.0, 0.0
    apart = False
    for offsets, sizes in _blocks(name, ours.tensors[name]):
        x, y = (stored.read(name, offsets, sizes) for stored in (ours, theirs))
        wide_x = x.double()
        norm += wide_x.square().sum().item()
        if content_of(x) == content_of(y):
            continue
        apart = True
        distance = wide_x - y.double()
        largest = max(largest, distance.abs().max().item(), key=lambda value: math.inf if math.isnan(value) else value)
        squares += distance.square().sum().item()
        if EXPERT_TENSOR.fullmatch(name):
            experts.append(offsets[0])
    if not apart:
        return None
    relative = math.sqrt(squares / norm) if norm > 0 and not math.isnan(squares) else math.inf if squares else 0.0
    return TensorDifference(name, "values", largest, relative, tuple(experts))


def _blocks(name: str, record: TensorRecord) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Runs of rows of bounded size; of a tensor of experts, each expert by itself."""
    shape = record.shape
    if not shape or 0 in shape:
        yield (0,) * len(shape), shape
        return
    row = math.prod(shape[1:]) * ITEM_BYTES[record.dtype]
    rows = 1 if EXPERT_TENSOR.fullmatch(name) else max(1, BLOCK_BYTES // row)
    for begin in range(0, shape[0], rows):
        yield (begin, *[0] * (len(shape) - 1)), (min(rows, shape[0] - begin), *shape[1:])
