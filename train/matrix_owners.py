"""Which rank orthogonalises which matrix, and which of its pieces travel. Every rank computes its own part, without a message.

A matrix has one owner among the ranks that hold a piece of it, so that each rank has about as many FLOPs: first experts among the
ranks that hold them, then the others among all ranks of the stage, the largest first and each to the rank that has least.

Ranks are those of a stage, counted from 0.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..moe.config import ModelConfig
from ..parallel.layout import DENSE, digits, members, shard_of
from ..parallel.shard import ShardMetadata
from .config.matrices import Index, Matrix, MuonConfig, matrices, newton_schulz_flops, row_widths

BUCKET = 2**24
"""Elements of a rank's pieces that are exchanged at a time, and at least one matrix of each parameter: buffers are as large."""


class Rectangle(NamedTuple):
    """`rows` x `columns` elements from (`row`, `column`) on: of a matrix, or at `leading` of a parameter."""

    row: int
    column: int
    rows: int
    columns: int
    leading: Index = ()


class Piece(NamedTuple):
    """A part of a matrix that some ranks hold."""

    of_parameter: Rectangle
    """In the global parameter."""
    of_matrix: Rectangle
    holders: tuple[int, ...]


class Sharding(NamedTuple):
    """A parameter that Muon updates."""

    shape: tuple[int, ...]
    """The global one."""
    by_fsdp: bool


class Work(NamedTuple):
    """A matrix that one of `ranks`, which hold its pieces, orthogonalises."""

    part: int
    """Of parameters of experts: which of a rank's experts it is of; else 0."""
    shape: tuple[int, int]
    pieces: tuple[Piece, ...]
    ranks: np.ndarray


class Local(NamedTuple):
    """A rectangle of this rank's piece of a parameter."""

    name: str
    place: Rectangle


class Owned(NamedTuple):
    """A rectangle of a matrix that this rank owns, by its number in the bucket."""

    number: int
    place: Rectangle


@dataclass
class Bucket:
    """What this rank does for some matrices. Lists by rank are in the same order on both of its ends."""

    names: list[str] = field(default_factory=list)
    """The parameters of which it is the first bucket."""
    ended: list[str] = field(default_factory=list)
    """Those of which it is the last."""
    travels: bool = False
    """Whether several ranks hold a matrix: so it is on all ranks of the stage, as experts are spread alike."""
    shapes: list[tuple[int, int]] = field(default_factory=list)
    """Of the matrices that this rank owns."""
    stays: list[tuple[Local, Owned]] = field(default_factory=list)
    """What this rank holds of the matrices that it owns."""
    sent: dict[int, list[Local]] = field(default_factory=lambda: defaultdict(list))
    """To owners."""
    received: dict[int, list[Owned]] = field(default_factory=lambda: defaultdict(list))
    returned: dict[int, list[Owned]] = field(default_factory=lambda: defaultdict(list))
    """To all that hold a piece of a matrix that this rank owns."""
    taken: dict[int, list[Local]] = field(default_factory=lambda: defaultdict(list))
    """From the owners of the matrices that this rank holds a piece of."""

    def stacked(self, sizes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether its parameters are stacks of whole matrices that this rank owns. `sizes`: of this rank's pieces of parameters."""
        whole = all(self.shapes[owned.number] == sizes[mine.name][-2:] for mine, owned in self.stays)
        return not self.travels and self.names == self.ended and whole


class Layout:
    """The ranks of a stage, seen from one of them. `sizes`: of both grids of ranks."""

    def __init__(self, model: ModelConfig, muon: MuonConfig, sizes: Mapping[str, int], rank: int) -> None:
        self.model, self.muon, self.sizes, self.rank = model, muon, sizes, rank
        self.ranks = range(math.prod(sizes[dim] for dim in DENSE[1:]))
        self.same = digits(("expert_replicate", "expert_shard", "expert_tensor"), sizes)
        """The dimensions of the ranks with the same experts."""
        self._works: dict[Any, list[Work]] = {}

    def works(self, name: str, sharding: Sharding) -> list[Work]:
        """Returns the matrices of a parameter, of experts those of this rank's. Layers have parameters of the same kinds."""
        kind = re.sub(r"\d+", "", name), row_widths(name, sharding.shape[-2], self.model, self.muon), sharding
        if kind not in self._works:
            held, experts = self._held(name, sharding), self.parts(name, sharding.shape)
            of_expert = ".experts." in name
            found = list[Work]()
            for matrix in matrices(name, sharding.shape, self.model, self.muon, experts.start, experts.stop):
                parts = tuple(pieces(matrix, held))
                ranks = np.array(sorted({rank for piece in parts for rank in piece.holders}))
                found.append(Work(matrix.runs[0].leading[0] - experts.start if of_expert else 0, matrix.shape, parts, ranks))
            self._works[kind] = found
        return self._works[kind]

    def parts(self, name: str, shape: tuple[int, ...]) -> range:
        """Returns the experts of this rank before FSDP shards them; of a parameter that is not of experts, one part."""
        if ".experts." not in name:
            return range(1)
        mine = shard_of(name, shape, self.model, self.sizes, False, self.rank)
        return range(mine.offsets[0], mine.offsets[0] + mine.sizes[0])

    def owners(self, named: Mapping[str, Sharding]) -> dict[str, list[int]]:
        """Returns the owner of each of the `works` of each parameter.

        Ranks with the same place among those with the same experts have as much work of experts.
        """
        load, found = np.zeros(len(self.ranks), dtype=np.int64), dict[str, list[int]]()
        for of_experts in (True, False):
            names = [name for name in named if (".experts." in name) is of_experts]
            works = [(name, number, work) for name in names for number, work in enumerate(self.works(name, named[name]))]
            found |= {name: [0] * len(self.works(name, named[name])) for name in names}
            for name, number, work in sorted(works, key=lambda each: -newton_schulz_flops(each[2].shape)):
                owner = int(work.ranks[load[work.ranks].argmin()])
                load[owner] += newton_schulz_flops(work.shape)
                found[name][number] = owner
            if of_experts:
                load = load[self._alike()]
        return found

    def _alike(self) -> np.ndarray:
        """Returns for each rank the one with its place among those with the experts of this rank."""
        place = np.zeros(len(self.ranks), dtype=np.int64)
        for size, stride in self.same:
            place = place * size + np.arange(len(self.ranks)) // stride % size
        return np.array(members(self.rank, self.same))[place]

    def _held(self, name: str, sharding: Sharding) -> dict[ShardMetadata, tuple[int, ...]]:
        """Returns who holds which shard of a parameter; of one of experts among the ranks with the experts of this rank."""
        found: dict[ShardMetadata, list[int]] = defaultdict(list)
        for rank in members(self.rank, self.same) if ".experts." in name else self.ranks:
            found[shard_of(name, sharding.shape, self.model, self.sizes, sharding.by_fsdp, rank)].append(rank)
        return {shard: tuple(ranks) for shard, ranks in found.items()}


def pieces(matrix: Matrix, held: Mapping[ShardMetadata, tuple[int, ...]]) -> Iterator[Piece]:
    """Yields the parts of a matrix that ranks hold, none empty."""
    for index, start, rows, at in matrix.runs:
        for (_, offsets, sizes), ranks in held.items():
            first, end = max(start, offsets[-2]), min(start + rows, offsets[-2] + sizes[-2])
            inside = all(low <= i < low + size for i, low, size in zip(index, offsets, sizes, strict=False))
            if inside and first < end and sizes[-1]:
                extent = end - first, sizes[-1]
                of_matrix = Rectangle(at + first - start, offsets[-1], *extent)
                yield Piece(Rectangle(first, offsets[-1], *extent, index), of_matrix, ranks)


def buckets(layout: Layout, named: Mapping[str, Sharding], limit: int = BUCKET) -> list[Bucket]:
    """Returns what this rank does for the matrices of these parameters, which are those of its stage, in their order.

    All ranks of the stage have as many buckets, and each matrix in the same one.
    """
    owners, found, elements = layout.owners(named), [Bucket()], 0
    for name, sharding in named.items():
        held, parts = math.prod(_first_shard(layout, name, sharding).sizes), layout.parts(name, sharding.shape)
        works = list(zip(layout.works(name, sharding), owners[name], strict=True))
        for part in range(len(parts)):
            size = -(-held // len(parts))
            if elements and elements + size > limit:
                found.append(Bucket())
                elements = 0
            elements += size
            if part == 0:
                found[-1].names.append(name)
            for work, owner in works:
                if work.part == part:
                    _add(found[-1], name, work, owner, layout.rank)
        found[-1].ended.append(name)
    return found


def _add(bucket: Bucket, name: str, work: Work, owner: int, me: int) -> None:
    """Adds what rank `me` does for one matrix. Of the ranks that hold a piece the nearest to the owner in the grids sends it."""
    number = len(bucket.shapes)
    bucket.travels = bucket.travels or len(work.ranks) > 1
    if owner == me:
        bucket.shapes.append(work.shape)
    for piece in work.pieces:
        mine, owned = Local(name, piece.of_parameter), Owned(number, piece.of_matrix)
        source = min(piece.holders, key=lambda rank: rank ^ owner)
        if me == owner == source:
            bucket.stays.append((mine, owned))
        elif me == owner:
            bucket.received[source].append(owned)
        elif me == source:
            bucket.sent[owner].append(mine)
        if me == owner:
            for rank in piece.holders:
                if rank != me:
                    bucket.returned[rank].append(owned)
        elif me in piece.holders:
            bucket.taken[owner].append(mine)


def _first_shard(layout: Layout, name: str, sharding: Sharding) -> ShardMetadata:
    """Returns the shard of rank 0, than which none is larger."""
    return shard_of(name, sharding.shape, layout.model, layout.sizes, sharding.by_fsdp, 0)
