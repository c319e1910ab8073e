"""Draws a layout as text: which rank holds what. Does not import torch or start anything.

Each rank is a column. Bars enclose ranks that communicate in every layer: `tensor` groups in the upper rows; in the lower rows the
groups that together hold all experts, in which colons separate ranks with different experts.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from .config import ParallelConfig
from .layout import DENSE, EXPERTS, mesh_sizes

COLUMNS = 104
"""Width of the ranks in one line."""
MAX_RANKS = 64
"""Beyond this number of ranks, only the first two bands and the last one are drawn."""
NAMES = 26
"""Width of the column of names."""

BARS = "bars part groups: above those of tensor, below those with all experts; : parts other experts; < and > go on elsewhere"


class Row(NamedTuple):
    """One line of the diagram."""

    name: str
    cells: list[str]
    """One for each rank."""
    run: int = 1
    """Ranks between two bars."""
    inner: int = 0
    """Ranks between two colons; 0 for no colons."""


def layout_diagram(config: ParallelConfig, world: int, node: int, experts: int) -> list[str]:
    """Returns the ranks, drawn. `node`: ranks of a node (the last has the rest); `experts`: of a layer, or 0."""
    sizes = mesh_sizes(config, world)
    lines = [BARS, ""] if world > 1 else []
    rows = [Row("rank", [str(rank) for rank in range(world)], sizes["tensor"]), *_dense(sizes, world)]
    if experts:
        rows += _experts(sizes, world, experts)
    width = max(len(cell) for row in rows for cell in row.cells)
    bands = _bands(world, node, width)
    left_out = bands[2:-1] if world > MAX_RANKS else []
    for band in bands:
        if band not in left_out:
            lines += [*_band(rows, band, node, width), ""]
        elif band is left_out[-1]:
            lines += [f"{'':{NAMES}}... ranks {left_out[0][0][0]} to {band[-1][-1]}, by the same rule ...", ""]
    return lines[:-1]


def coordinates(dim: str, sizes: dict[str, int], world: int) -> list[int]:
    """Returns the coordinate of each rank in the dimension `dim`."""
    return [rank // _stride(dim, sizes) % sizes[dim] for rank in range(world)]


def _stride(dim: str, sizes: dict[str, int]) -> int:
    """Returns the distance of neighbours in a dimension, in ranks."""
    dims = DENSE if dim in DENSE else EXPERTS
    return math.prod(sizes[inner] for inner in dims[dims.index(dim) + 1 :])


def _dense(sizes: dict[str, int], world: int) -> Iterator[Row]:
    """Yields the parts of the batch and of the dense weights. If data ranks are all shards, or all replicas, that is one row."""
    run, rows = sizes["tensor"], sizes["tensor"] * sizes["context"]
    data = world // rows // sizes["pipeline"]
    same = [dim for dim in ("shard", "replicate") if sizes[dim] == data > 1]
    yield Row(f"{' = '.join(['batch', *same])}, of {data}", [str(rank // rows % data) for rank in range(world)], run)
    dims = [dim for dim in ("tensor", "context", "shard", "replicate", "pipeline") if dim not in same]
    yield from _parts(dims, sizes, world, run, 0)


def _experts(sizes: dict[str, int], world: int, experts: int) -> Iterator[Row]:
    """Yields the experts of each rank, and its parts of them, after a row of bars."""
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
    """Returns the ranks of each band, for cells of this `width`: those of as many nodes as fit, or an even part of a node."""
    fit = max(1, COLUMNS // (width + 3))
    part = next(size for size in range(min(fit, node), 0, -1) if node % size == 0)
    title = len(f"node {world // node}")
    side_by_side = max(1, COLUMNS // (max(part * (width + 3) + 1, title) + 2)) if part == node else 1
    chunks = [range(start, min(start + part, world)) for start in range(0, world, part)]
    return [chunks[start : start + side_by_side] for start in range(0, len(chunks), side_by_side)]


def _band(rows: list[Row], chunks: list[range], node: int, width: int) -> Iterator[str]:
    drawn = [[f"node {chunk[0] // node}", *(_drawn(row, chunk, width) for row in rows)] for chunk in chunks]
    names, several = ["", *(row.name for row in rows)], len(rows[0].cells) > node
    for index, name in list(enumerate(names))[0 if several else 1 :]:
        cells = [lines[index].ljust(max(map(len, lines))) for lines in drawn]
        yield f"{name:{NAMES}}{'  '.join(cells)}".rstrip()


def _drawn(row: Row, chunk: range, width: int) -> str:
    """Returns the cells of the ranks in `chunk`, with bars and colons."""
    text = "|" if chunk[0] % row.run == 0 else "<"
    for rank in chunk:
        text += f" {row.cells[rank]:^{width}} "
        last = rank == chunk[-1]
        edge = ":" if row.inner and (rank + 1) % row.inner == 0 else " "
        text += "|" if (rank + 1) % row.run == 0 else ">" if last else edge
    return text


def _ids(first: int, number: int) -> str:
    if number <= 2:
        return ",".join(str(first + index) for index in range(number))
    return f"{first}-{first + number - 1}"
