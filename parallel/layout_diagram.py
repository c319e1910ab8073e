"""A layout as text: which rank holds what, and which ranks are neighbours. No torch: nothing is started or built for it.

A rank is a column. Between two bars are neighbours that send to each other in every layer: `tensor` groups above, below them the
groups that hold all experts once, in which colons part those that hold the same experts.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from .config import ParallelConfig
from .layout import DENSE, EXPERTS, mesh_sizes

COLUMNS = 104
"""How wide the ranks of one line may be."""
MOST = 64
"""Ranks that are all drawn; of more the first two lines and the last one are."""
NAMES = 26
"""Width of the names at the left."""

SENDS = {
    "tensor": "every layer: sequences gathered, partial sums scattered",
    "expert_tensor": "every MoE layer: rows to all of them, partial sums back",
    "expert": "every MoE layer: tokens to their experts and back",
    "shard": "FSDP2: weights gathered, gradients summed and scattered",
    "expert_shard": "the same for the weights of experts",
    "replicate": "once a step: gradients summed",
    "expert_replicate": "once a step: gradients of experts summed",
}
"""What the ranks that differ in one dimension alone send to each other, the most frequent first."""

BARS = "bars part groups: above those of tensor, below those with all experts; : parts other experts; < and > go on elsewhere"


class Row(NamedTuple):
    """One line of the picture."""

    name: str
    cells: list[str]
    """One for each rank."""
    run: int = 1
    """A bar stands after each so many ranks."""
    inner: int = 0
    """And a colon after each so many; 0 for none."""


def picture(config: ParallelConfig, world: int, node: int, experts: int) -> list[str]:
    """The lines: the groups in words, then the ranks. A node has `node` ranks (the last one the rest), a layer `experts` or 0."""
    sizes = mesh_sizes(config, world)
    dims = [dim for dim in SENDS if sizes[dim] > 1 and (experts or dim in DENSE)]
    lines = [*_groups(dims, sizes, world, node), "", BARS, ""] if world > 1 else []
    rows = [Row("rank", [str(rank) for rank in range(world)], sizes["tensor"]), *_dense(sizes, world)]
    if experts:
        rows += _experts(sizes, world, experts)
    width = max(len(cell) for row in rows for cell in row.cells)
    bands = _bands(world, node, width)
    left_out = bands[2:-1] if world > MOST else []
    for band in bands:
        if band not in left_out:
            lines += [*_band(rows, band, node, width), ""]
        elif band is left_out[-1]:
            lines += [f"{'':{NAMES}}... ranks {left_out[0][0][0]} to {band[-1][-1]}, by the same rule ...", ""]
    return lines[:-1]


def coordinates(dim: str, sizes: dict[str, int], world: int) -> list[int]:
    """Where each rank is in the dimension `dim` of its grid."""
    return [rank // _stride(dim, sizes) % sizes[dim] for rank in range(world)]


def _stride(dim: str, sizes: dict[str, int]) -> int:
    """How far apart neighbours in a dimension are."""
    dims = DENSE if dim in DENSE else EXPERTS
    return math.prod(sizes[inner] for inner in dims[dims.index(dim) + 1 :])


def _dense(sizes: dict[str, int], world: int) -> Iterator[Row]:
    """Which part of the batch and of the dense weights. Where only shards, or only replicas, have other rows it is one line."""
    run, data = sizes["tensor"], world // sizes["tensor"]
    same = [dim for dim in ("shard", "replicate") if sizes[dim] == data > 1]
    yield Row(f"{' = '.join(['batch', *same])}, of {data}", [str(rank // run) for rank in range(world)], run)
    yield from _parts([dim for dim in ("tensor", "shard", "replicate") if dim not in same], sizes, world, run, 0)


def _experts(sizes: dict[str, int], world: int, experts: int) -> Iterator[Row]:
    """Which experts, and which part of them; after a line of bars."""
    holders, each = sizes["expert_tensor"], experts // sizes["expert"]
    run, inner = sizes["expert"] * holders, holders if holders > 1 else 0
    first = [each * place for place in coordinates("expert", sizes, world)]
    yield Row("", [""] * world, run, inner)
    yield Row(f"experts, of {experts}", [_ids(expert, each) for expert in first], run, inner)
    yield from _parts(["expert_tensor", "expert_shard", "expert_replicate"], sizes, world, run, inner)


def _parts(dims: list[str], sizes: dict[str, int], world: int, run: int, inner: int) -> Iterator[Row]:
    for dim in dims:
        if sizes[dim] > 1:
            yield Row(f"{dim}, of {sizes[dim]}", [str(place) for place in coordinates(dim, sizes, world)], run, inner)


def _bands(world: int, node: int, width: int) -> list[list[range]]:
    """The ranks of each line with cells of this `width`: those of as many nodes as fit, or an even part of one."""
    fit = max(1, COLUMNS // (width + 3))
    part = next(size for size in range(min(fit, node), 0, -1) if node % size == 0)
    title = len(f"node {world // node}")
    beside = max(1, COLUMNS // (max(part * (width + 3) + 1, title) + 2)) if part == node else 1
    chunks = [range(start, min(start + part, world)) for start in range(0, world, part)]
    return [chunks[start : start + beside] for start in range(0, len(chunks), beside)]


def _band(rows: list[Row], chunks: list[range], node: int, width: int) -> Iterator[str]:
    drawn = [[f"node {chunk[0] // node}", *(_drawn(row, chunk, width) for row in rows)] for chunk in chunks]
    names, several = ["", *(row.name for row in rows)], len(rows[0].cells) > node
    for index, name in list(enumerate(names))[0 if several else 1 :]:
        cells = [lines[index].ljust(max(map(len, lines))) for lines in drawn]
        yield f"{name:{NAMES}}{'  '.join(cells)}".rstrip()


def _drawn(row: Row, chunk: range, width: int) -> str:
    """The cells of some ranks, with what stands between them."""
    text = "|" if chunk[0] % row.run == 0 else "<"
    for rank in chunk:
        text += f" {row.cells[rank]:^{width}} "
        last = rank == chunk[-1]
        edge = ":" if row.inner and (rank + 1) % row.inner == 0 else " "
        text += "|" if (rank + 1) % row.run == 0 else ">" if last else edge
    return text


def _groups(dims: list[str], sizes: dict[str, int], world: int, node: int) -> Iterator[str]:
    """A line for each of `dims`."""
    yield f"{'group of':{NAMES}}ranks  groups  {'the first':<14}{'where':<16}what they send to each other"
    for dim in dims:
        size, stride = sizes[dim], _stride(dim, sizes)
        starts = [rank for rank, place in enumerate(coordinates(dim, sizes, world)) if place == 0]
        nodes = max(len({(start + stride * place) // node for place in range(size)}) for start in starts)
        where = "inside a node" if nodes == 1 else f"over {nodes} nodes"
        yield f"{dim:{NAMES}}{size:>5}{len(starts):>8}  {_members(size, stride):<14}{where:<16}{SENDS[dim]}"


def _members(size: int, stride: int) -> str:
    """The ranks of the first group."""
    if size <= 3:
        return ",".join(str(place * stride) for place in range(size))
    last = (size - 1) * stride
    return f"0-{last}" if stride == 1 else f"0,{stride},..,{last}"


def _ids(first: int, number: int) -> str:
    if number <= 2:
        return ",".join(str(first + index) for index in range(number))
    return f"{first}-{first + number - 1}"
