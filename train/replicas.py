"""Whether the ranks that must hold the same weights do: a hash of each parameter, compared over those ranks.

A bit that flips in one replica changes no loss at once and no norm of a gradient; nobody would know before the model is bad.
"""

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from ..parallel.apply import Parallel, local
from ..parallel.collectives import max_over, stack_over
from ..parallel.mesh import Axis
from .checkpoint.agree import from_all

BLOCK = 2**20
"""Elements that are hashed at once."""


class Difference(NamedTuple):
    """A piece of a parameter of which copies differ."""

    name: str
    ranks: tuple[int, ...]
    """Those without the value that most have; all, if no value is that of more than half."""
    source: int | None
    """A rank with the value that most have."""
    copies: tuple[int, ...]
    """The ranks that hold this piece."""


def differences(parallel: Parallel) -> list[Difference]:
    """Every piece whose copies are not bit for bit the same, the same list on every rank.

    One small tensor for each set of ranks that holds copies, and one number over all. Collective.
    """
    mine = [difference for axis, names in _by_axis(parallel).items() for difference in _among(parallel, axis, names)]
    found = torch.tensor([float(len(mine))], device=parallel.device)
    if not max_over(found, parallel.mesh.everyone).item():
        return []
    return sorted({difference for each in from_all(mine) for difference in each}, key=lambda one: (one.name, one.copies))


def hash_of(tensor: Tensor) -> Tensor:
    """int64, of the bits. A single changed bit always changes it: each 32 of them are multiplied by an odd number and added."""
    flat = tensor.detach().contiguous().flatten()
    words = flat.view(torch.int32) if flat.element_size() >= 4 else flat.view(torch.int16)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for number, block in enumerate(words.split(BLOCK)):
        odd = torch.arange(number * BLOCK, number * BLOCK + len(block), device=flat.device, dtype=torch.int64)
        odd = odd * -7046029254386353131 | 1
        total = total + (block.long() * odd).sum()
    return total


def _by_axis(parallel: Parallel) -> dict[Axis, list[str]]:
    found: dict[Axis, list[str]] = defaultdict(list)
    for name, placed in parallel.placed.items():
        if placed.copies.size > 1 and local(placed.parameter).numel():
            found[placed.copies].append(name)
    return found


def _among(parallel: Parallel, axis: Axis, names: list[str]) -> list[Difference]:
    """Of the ranks of one axis: the largest and, of the complements, the smallest hash; then, if they differ, who has which."""
    hashes_P = torch.stack([hash_of(local(parallel.placed[name].parameter)) for name in names])
    most_P, least_P = max_over(torch.cat([hashes_P, ~hashes_P]), axis).chunk(2)
    wrong = (most_P != ~least_P).nonzero().flatten()
    if not len(wrong):
        return []
    hashes_NP = stack_over(hashes_P[wrong], axis).tolist()
    ranks = stack_over(torch.tensor([parallel.mesh.rank], device=hashes_P.device), axis).flatten().tolist()
    columns = zip(*hashes_NP, strict=True)
    return [_difference(names[place], ranks, column) for place, column in zip(wrong.tolist(), columns, strict=True)]


def _difference(name: str, ranks: list[int], hashes: tuple[int, ...]) -> Difference:
    value = max(set(hashes), key=hashes.count)
    if 2 * hashes.count(value) <= len(hashes):
        return Difference(name, tuple(ranks), None, tuple(ranks))
    wrong = [rank for rank, own in zip(ranks, hashes, strict=True) if own != value]
    return Difference(name, tuple(wrong), ranks[hashes.index(value)], tuple(ranks))
