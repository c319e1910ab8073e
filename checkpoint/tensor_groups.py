"""The index of a checkpoint: tensors of one dtype and shape that are cut alike are a group, which has each rectangle once.

A layout cuts tensors along grids, so a group usually is a few numbers for each dimension, and one file for each cell of the grid.
The size of the index grows with the ranks and with the kinds of tensors, not with their product with the layers. No torch here.
"""

import itertools
import math
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from ..parallel.shard import ShardMetadata, disjoint
from .bounded import MOST_DIMENSIONS, brief, check_name

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of an element by dtype, as safetensors codes it."""


class ChunkRecord(NamedTuple):
    """A rectangle of a tensor, stored as the tensor `key` of the safetensors file `file`."""

    metadata: ShardMetadata
    file: str
    key: str


class TensorRecord(NamedTuple):
    """A tensor: its dtype as safetensors codes it, its global shape, and its rectangles, without those that are empty."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Sequence[ChunkRecord]

    def overlapping(self, metadata: ShardMetadata) -> Iterable[ChunkRecord]:
        """Returns the chunks that share an element with a rectangle of the tensor."""
        if isinstance(self.chunks, GroupChunks):
            return self.chunks.overlapping(metadata)
        return [chunk for chunk in self.chunks if 0 not in metadata.sizes and chunk.metadata.overlaps(metadata)]


Run = tuple[int, int]
"""Of the tensors of a group in their order: how many, and the number of the file that holds one cell of theirs."""


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that are cut alike: `cells` are the rectangles of each, sorted; `runs[c]` says in which files the cells `c` are."""

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    cells: "Cells"
    runs: tuple[tuple[Run, ...], ...]

    def records(self) -> dict[str, TensorRecord]:
        """Returns the tensors by name."""
        return {name: TensorRecord(self.dtype, self.shape, GroupChunks(self, place)) for place, name in enumerate(self.names)}

    def file(self, cell: int, place: int) -> int:
        """Returns the number of the file that has a cell of the tensor at `place` of the names."""
        return self.runs[cell][bisect_right(self._ends[cell], place)][1]

    def stored_in(self, files: Collection[int]) -> Iterator[tuple[int, int, range]]:
        """Yields a file of `files`, a cell, and the places of the tensors whose cell it holds."""
        for cell, (runs, ends) in enumerate(zip(self.runs, self._ends, strict=True)):
            for (count, file), end in zip(runs, ends, strict=True):
                if file in files:
                    yield file, cell, range(end - count, end)

    def bytes_by_file(self) -> Iterator[tuple[int, int]]:
        """Yields numbers of files, each as often as it likes, with bytes that they hold of the group."""
        for cell, runs in enumerate(self.runs):
            size = math.prod(self.cells[cell].sizes) * ITEM_BYTES[self.dtype]
            yield from ((file, count * size) for count, file in runs)

    @cached_property
    def _ends(self) -> list[list[int]]:
        return [list(itertools.accumulate(count for count, _ in runs)) for runs in self.runs]


class Cells(Sequence[ShardMetadata]):
    """Disjoint rectangles that make up a tensor of `shape`: the cells of a grid, last dimension fastest, or any, in a sorted list.

    cuts: for each dimension where each cell begins, and the extent of the dimension last; None if they are no grid.
    """

    def __init__(self, shape: tuple[int, ...], cuts: list[list[int]] | None, rectangles: list[ShardMetadata] | None) -> None:
        assert (cuts is None) != (rectangles is None)
        self.shape, self.cuts, self.rectangles = shape, cuts, rectangles

    def __len__(self) -> int:
        return len(self.rectangles) if self.rectangles is not None else math.prod(len(cut) - 1 for cut in self.cuts or [])

    def __getitem__(self, cell: Any) -> Any:
        if self.rectangles is not None:
            return self.rectangles[cell]
        offsets, sizes = [], []
        for cut in reversed(self.cuts or []):
            cell, place = divmod(cell, len(cut) - 1)
            offsets.append(cut[place])
            sizes.append(cut[place + 1] - cut[place])
        if cell:
            raise IndexError
        return ShardMetadata(self.shape, tuple(offsets[::-1]), tuple(sizes[::-1]))

    def overlapping(self, metadata: ShardMetadata) -> Iterable[int]:
        """Returns the numbers of the cells that share an element with a rectangle."""
        if 0 in metadata.sizes:
            return []
        if self.rectangles is not None:
            return [number for number, one in enumerate(self.rectangles) if one.overlaps(metadata)]
        spans = [
            range(bisect_right(cut, offset) - 1, bisect_left(cut, offset + size))
            for cut, offset, size in zip(self.cuts or [], metadata.offsets, metadata.sizes, strict=True)
        ]
        counts = [len(cut) - 1 for cut in self.cuts or []]
        strides = [math.prod(counts[dim + 1 :]) for dim in range(len(counts))]
        return [sum(map(operator.mul, place, strides)) for place in itertools.product(*spans)]


class GroupChunks(Sequence[ChunkRecord]):
    """The chunks of the tensor at `place` of a group's names, made when they are asked for."""

    def __init__(self, group: TensorGroup, place: int) -> None:
        self.group, self.place = group, place

    def __len__(self) -> int:
        return len(self.group.cells)

    def __getitem__(self, cell: Any) -> Any:
        file = file_of_rank(self.group.file(cell, self.place))
        return ChunkRecord(self.group.cells[cell], file, self.group.names[self.place])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def overlapping(self, metadata: ShardMetadata) -> Iterable[ChunkRecord]:
        """Returns the chunks that share an element with a rectangle."""
        return [self[cell] for cell in self.group.cells.overlapping(metadata)]


def file_of_rank(rank: int) -> str:
    """Returns the name of the file that a rank writes, which has the rank's number."""
    return f"shard_{rank:05d}.safetensors"


def make_cells(shape: tuple[int, ...], rectangles: Iterable[ShardMetadata]) -> Cells:
    """Returns different, non-empty rectangles as cells. Raises ValueError if they do not cover each element of the shape once."""
    found = sorted(rectangles, key=lambda one: one.offsets)
    spans = [sorted({(one.offsets[dim], one.offsets[dim] + one.sizes[dim]) for one in found}) for dim in range(len(shape))]
    cuts = [[0, *(end for _, end in span)] for span in spans]
    grid = all(begin == cut[place] for span, cut in zip(spans, cuts, strict=True) for place, (begin, _) in enumerate(span))
    # All different, each a product of one span of each dimension, and as many as there are such products: all cells of a grid.
    if found and grid and all(cut[-1] == extent for cut, extent in zip(cuts, shape, strict=True)):
        cells = Cells(shape, cuts, None)
        if len(cells) == len(found):
            return cells
    cells = Cells(shape, None, found)
    _check_tiling(cells)
    return cells


def _check_tiling(cells: Cells) -> None:
    found, total = cells.rectangles or [], math.prod(cells.shape)
    if len(found) > 1 and not disjoint(found):
        raise ValueError("two ranks hold shards that overlap but differ; shards must be equal or apart")
    covered = sum(math.prod(one.sizes) for one in found)
    if covered != total:
        raise ValueError(f"the ranks hold {covered} of its {total} elements; the shards must make up the whole")


def groups_of(tensors: Mapping[str, TensorRecord]) -> list[TensorGroup]:
    """Returns the groups that `tensors`, which all are of groups, come from."""
    chunks = [record.chunks for record in tensors.values()]
    assert all(isinstance(one, GroupChunks) for one in chunks)
    return list({id(one.group): one.group for one in chunks if isinstance(one, GroupChunks)}.values())


def tensors_by_file(
    tensors: Mapping[str, TensorRecord], files: Collection[str]
) -> dict[str, list[tuple[str, tuple[str, tuple[int, ...]]]]]:
    """Returns for each of `files` the keys that it must have, each with its dtype and shape."""
    found: dict[str, list[tuple[str, tuple[str, tuple[int, ...]]]]] = {file: [] for file in files}
    numbers = {number: file for file in files if file == file_of_rank(number := int("0" + "".join(filter(str.isdecimal, file))))}
    groups = {}
    for record in tensors.values():
        if isinstance(record.chunks, GroupChunks):
            groups[id(record.chunks.group)] = record.chunks.group
            continue
        for chunk in record.chunks:
            if chunk.file in found:
                found[chunk.file].append((chunk.key, (record.dtype, chunk.metadata.sizes)))
    for group in groups.values():
        for number, cell, places in group.stored_in(numbers):
            stated = group.dtype, group.cells[cell].sizes
            found[numbers[number]] += [(group.names[place], stated) for place in places]
    return found


def plain_group(group: TensorGroup) -> dict[str, Any]:
    """Returns a group as JSON."""
    cells = group.cells
    cut = {"cuts": cells.cuts} if cells.cuts is not None else {"rectangles": [[one.offsets, one.sizes] for one in cells]}
    files = [runs[0][1] if len(runs) == 1 else runs for runs in group.runs]
    return {"dtype": group.dtype, "shape": group.shape, **cut, "files": files, "names": group.names}


def parse_group(one: Any) -> TensorGroup:
    """Returns a group from JSON. Raises ValueError for anything that no checkpoint has; KeyError for a key that is missing."""
    if not isinstance(one, dict):
        raise ValueError(f"{brief(one)} must be an object that describes tensors")
    names = tuple(check_name(name) for name in a_list(one["names"]))
    if not names or len(set(names)) != len(names):
        raise ValueError(f"names = {brief(names)} must name at least one tensor, and each once")
    dtype, shape = one["dtype"], counts(one["shape"])
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {names[0]!r}: dtype = {brief(dtype)} must be one of {', '.join(ITEM_BYTES)}")
    try:
        cells = _parse_cells(shape, one)
    except ValueError as error:
        raise ValueError(f"tensor {names[0]!r} is incomplete: {error}") from None
    files = a_list(one["files"])
    if len(files) != len(cells):
        raise ValueError(f"tensor {names[0]!r}: {len(files)} files must be as many as its {len(cells)} rectangles")
    runs = tuple(_parse_runs(names, file) for file in files)
    return TensorGroup(dtype, shape, names, cells, runs)


def _parse_cells(shape: tuple[int, ...], one: dict[str, Any]) -> Cells:
    if "cuts" not in one:
        pairs = [(counts(offsets), counts(sizes)) for offsets, sizes in map(a_list, a_list(one["rectangles"]))]
        if any(not len(offsets) == len(sizes) == len(shape) or 0 in sizes for offsets, sizes in pairs):
            raise ValueError(f"its rectangles must hold something and have {len(shape)} dimensions")
        cells = Cells(shape, None, [ShardMetadata(shape, offsets, sizes) for offsets, sizes in pairs])
        if any(offset + size > extent for one in cells for offset, size, extent in zip(one.offsets, one.sizes, shape, strict=True)):
            raise ValueError(f"its rectangles must lie inside of the shape {shape}")
        _check_tiling(cells)
        return cells
    cuts = [[count(value) for value in a_list(cut)] for cut in a_list(one["cuts"])]
    for cut, extent in zip(cuts, shape, strict=False):
        rising = all(map(operator.lt, cut, cut[1:]))
        if len(cut) < 2 or cut[0] != 0 or cut[-1] != extent or not rising:
            raise ValueError(f"cuts = {brief(cut)} must rise from 0 to {extent}")
    if len(cuts) != len(shape):
        raise ValueError(f"its cuts must be those of {len(shape)} dimensions")
    return Cells(shape, cuts, None)


def _parse_runs(names: tuple[str, ...], files: Any) -> tuple[Run, ...]:
    runs = [[len(names), files]] if isinstance(files, int) else files
    if not isinstance(runs, list) or not all(isinstance(run, list) and len(run) == 2 for run in runs):
        raise ValueError(f"tensor {names[0]!r}: files = {brief(files)} must be a file's number, or lists of how many and in which")
    found = tuple((count(number), count(file)) for number, file in runs)
    if sum(number for number, _ in found) != len(names) or any(number == 0 for number, _ in found):
        raise ValueError(f"tensor {names[0]!r}: files = {brief(files)} must say for {len(names)} tensors where they are")
    return found


def a_list(value: Any) -> list[Any]:
    """Returns `value`. Raises ValueError unless it is a list."""
    if not isinstance(value, list):
        raise ValueError(f"{brief(value)} must be a list")
    return value


def counts(values: Any) -> tuple[int, ...]:
    """Returns whole numbers, one for each dimension. Raises ValueError for anything else."""
    if len(a_list(values)) > MOST_DIMENSIONS:
        raise ValueError(f"{len(values)} dimensions are more than {MOST_DIMENSIONS}")
    return tuple(count(value) for value in values)


def count(value: Any) -> int:
    """Returns `value`. Raises ValueError unless it is a whole number that a size may be."""
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"{brief(value)} must be a whole number >= 0 and below 2^53")
    return value
