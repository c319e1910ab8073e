"""Which rank writes which rectangle of which tensor. Each rank computes the same plan, once while the shards stay the same.

What ranks hold is told in two parts that many of them have in common, so that few bytes travel: names of tensors (the same on all
ranks of a pipeline stage), and rectangles (one for each kind of tensor, the same on replicas). Tensors that the same ranks hold in
the same rectangles are planned together: the work grows with the ranks and the kinds of tensors, not with the layers.
"""

import heapq
import json
import math
import zlib
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..parallel.shard import LocalShard, ShardMetadata
from .safetensors_file import CODES, DTYPES
from .tensor_groups import ITEM_BYTES, Cells, Run, TensorGroup, TensorRecord, make_cells

SLACK = 0.01
"""By how much a rank may write more than the average, to keep small tensors together."""


class HeldShards(NamedTuple):
    """What a rank holds, without the values, as it tells the others."""

    names: bytes
    """JSON, compressed: for each kind of its shards, dtype, shape, and the names of the tensors. A name that ends with the rank's
    number is a list of what precedes it, so that ranks which differ in that alone say the same."""
    rectangles: bytes
    """JSON: for each kind, offsets and sizes."""


class SavePlan(NamedTuple):
    """The part of one rank in a save."""

    names: list[str]
    """Tensors whose local shard this rank writes into its file."""
    tensors: dict[str, TensorRecord]
    """All tensors of all ranks, for rank 0, which writes the manifest; none for the others."""
    bytes: int
    """Written by all ranks together."""


class _Kind(NamedTuple):
    """Tensors that the same ranks hold in the same rectangles."""

    dtype: str
    shape: tuple[int, ...]
    names: list[str]
    holders: dict[ShardMetadata, list[int]]
    """The ranks that hold each rectangle; none is empty."""


def held_shards(shards: dict[str, LocalShard], rank: int) -> HeldShards:
    """Returns what a rank tells the others. Raises ValueError for a shard that cannot be saved."""
    kinds: dict[tuple[str, ShardMetadata], list[str | list[str]]] = defaultdict(list)
    own = f".rank_{rank}"
    for name, shard in shards.items():
        check_shard(name, shard)
        metadata, tensor = shard
        if tensor.dtype not in CODES:
            known = ", ".join(map(dtype_name, CODES))
            raise ValueError(f"tensor {name!r}: dtype {dtype_name(tensor.dtype)} cannot be saved; these can: {known}")
        kind = CODES[tensor.dtype], ShardMetadata(*map(tuple, metadata))
        kinds[kind].append([name.removesuffix(str(rank))] if name.endswith(own) else name)
    names = [(dtype, metadata.shape, names) for (dtype, metadata), names in kinds.items()]
    rectangles = [(metadata.offsets, metadata.sizes) for _, metadata in kinds]
    return HeldShards(zlib.compress(json.dumps(names).encode(), 1), json.dumps(rectangles).encode())


def make_save_plan(names: list[bytes], rectangles: list[bytes], held: list[tuple[int, int]], rank: int) -> SavePlan:
    """Returns the plan of `rank`. `held`: for each rank, which of the `names` and of the `rectangles` it holds (`HeldShards`).

    Each rectangle is written once, by one of the ranks that hold it, such that all ranks write about the same number of bytes.
    Raises ValueError, the same on every rank, for shards that do not make up their tensor.
    """
    kinds = _kinds(names, rectangles, held)
    groups: dict[tuple[str, tuple[int, ...], frozenset[ShardMetadata]], list[tuple[_Kind, dict[ShardMetadata, list[Run]]]]]
    groups = defaultdict(list)
    runs = _runs(kinds, len(held))
    own: list[str] = []
    for kind, by_cell in zip(kinds, runs, strict=True):
        groups[kind.dtype, kind.shape, frozenset(by_cell)].append((kind, by_cell))
        for cell in by_cell.values():
            start = 0
            for count, writer in cell:
                own += kind.names[start : start + count] if writer == rank else []
                start += count
    made = []
    for (dtype, shape, found), members in groups.items():
        cells = _cells(members[0][0].names[0], shape, found)
        joined = tuple(tuple(run for _, by_cell in members for run in by_cell[cell]) for cell in cells)
        made.append(TensorGroup(dtype, shape, tuple(name for kind, _ in members for name in kind.names), cells, joined))
    total = sum(math.prod(kind.shape) * ITEM_BYTES[kind.dtype] * len(kind.names) for kind in kinds)
    records = {name: record for group in made for name, record in group.records().items()}
    return SavePlan(sorted(own), records if rank == 0 else {}, total)


def check_shard(name: str, shard: LocalShard) -> None:
    """Raises ValueError if the tensor has not the sizes of its metadata, or the rectangle is not inside of the global shape."""
    metadata, tensor = shard
    if tuple(tensor.shape) != tuple(metadata.sizes):
        sizes = tuple(metadata.sizes)
        raise ValueError(f"tensor {name!r}: the local shape {tuple(tensor.shape)} must be the shard's sizes {sizes}")
    rectangle = [(offset, offset + size) for offset, size in zip(metadata.offsets, metadata.sizes, strict=True)]
    if any(begin < 0 or end > extent for (begin, end), extent in zip(rectangle, metadata.shape, strict=True)):
        text = ", ".join(f"{begin}:{end}" for begin, end in rectangle)
        raise ValueError(f"tensor {name!r}: [{text}] must lie inside of the shape {tuple(metadata.shape)}")


def dtype_name(dtype: torch.dtype) -> str:
    """Returns "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


Source = tuple[int, int, int | None]
"""Which names, which kind in it, and the rank if the name is that rank's own."""


def _kinds(names: list[bytes], rectangles: list[bytes], held: list[tuple[int, int]]) -> list[_Kind]:
    """Returns all tensors, by the sources that they have in common. Raises ValueError if two give another shape or dtype."""
    told = [[(dtype, tuple(shape), held_names) for dtype, shape, held_names in json.loads(zlib.decompress(one))] for one in names]
    ranks: list[list[int]] = [[] for _ in names]
    for rank, (which, _) in enumerate(held):
        ranks[which].append(rank)
    places = [[(tuple(offsets), tuple(sizes)) for offsets, sizes in json.loads(one)] for one in rectangles]
    sources: dict[str, list[Source]] = defaultdict(list)
    for which, kinds in enumerate(told):
        for kind, (_, _, held_names) in enumerate(kinds):
            for name in held_names:
                if isinstance(name, str):
                    sources[name].append((which, kind, None))
                else:
                    for rank in ranks[which]:
                        sources[f"{name[0]}{rank}"].append((which, kind, rank))
    alike: dict[tuple[Source, ...], list[str]] = defaultdict(list)
    for name, found in sources.items():
        alike[tuple(found)].append(name)
    made = []
    for found, names_alike in alike.items():
        kinds = {told[which][kind][:2] for which, kind, _ in found}
        if len(kinds) > 1:
            text = " and ".join(f"{dtype_name(DTYPES[dtype])} {shape}" for dtype, shape in sorted(kinds))
            raise ValueError(f"tensor {names_alike[0]!r}: shape and dtype must be the same on all ranks, not {text}")
        [(dtype, shape)] = kinds
        holders: dict[ShardMetadata, list[int]] = defaultdict(list)
        for which, kind, one in found:
            for rank in ranks[which] if one is None else [one]:
                metadata = ShardMetadata(shape, *places[held[rank][1]][kind])
                if 0 not in metadata.sizes:
                    holders[metadata].append(rank)
        made.append(_Kind(dtype, shape, sorted(names_alike), dict(holders)))
    return made


def _runs(kinds: list[_Kind], world: int) -> list[dict[ShardMetadata, list[Run]]]:
    """Returns for each kind and rectangle how many of the tensors, in their order, which rank writes.

    Rectangles that only one rank holds come first: they leave no choice, and their bytes count in the choices that follow, of which
    the largest come first.
    """
    load = [0] * world
    found: list[dict[ShardMetadata, list[Run]]] = [{} for _ in kinds]
    choices = []
    for place, kind in enumerate(kinds):
        for metadata, ranks in kind.holders.items():
            size = math.prod(metadata.sizes) * ITEM_BYTES[kind.dtype]
            if len(ranks) == 1:
                load[ranks[0]] += size * len(kind.names)
                found[place][metadata] = [(len(kind.names), ranks[0])]
            else:
                choices.append((-size, place, metadata, tuple(sorted(ranks))))
    total = sum(load) - sum(size * len(kinds[place].names) for size, place, _, _ in choices)
    writers = _Writers(load, int(total / world * (1 + SLACK)))
    for size, place, metadata, ranks in sorted(choices):
        found[place][metadata] = list(writers.give(len(kinds[place].names), -size, ranks))
    return found


class _Writers:
    """Chooses writers among holders: the one that wrote last, up to a `limit` of bytes, then the one with the fewest bytes so far.

    So small tensors that all ranks hold are in few files, and a rank that loads them opens few.
    """

    def __init__(self, load: list[int], limit: int) -> None:
        self.load, self.limit = load, limit
        self.last: dict[tuple[int, ...], int] = {}

    def give(self, number: int, size: int, ranks: tuple[int, ...]) -> Iterator[Run]:
        """Yields the writers of `number` tensors of `size` bytes each."""
        load, count, rank = self.load, 0, self.last.get(ranks)
        least = [(load[one], one) for one in ranks]
        heapq.heapify(least)
        for _ in range(number):
            if rank is None or load[rank] + size > self.limit:
                if rank is not None and count:
                    yield count, rank
                while load[least[0][1]] > least[0][0]:
                    heapq.heapreplace(least, (load[least[0][1]], least[0][1]))
                rank, count = least[0][1], 0
            load[rank] += size
            count += 1
        assert rank is not None
        yield count, rank
        self.last[ranks] = rank


def _cells(name: str, shape: tuple[int, ...], found: frozenset[ShardMetadata]) -> Cells:
    try:
        return make_cells(shape, found)
    except ValueError as error:
        raise ValueError(f"tensor {name!r}: {error}") from None
