"""Whether the ranks that must hold the same weights do: a hash of each parameter, compared over those ranks.

A bit that flips in one replica changes no loss at once and no norm of a gradient; nobody would know before the model is bad.
"""

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from ...parallel.apply import Parallel, local
from ...parallel.collectives import max_over, stack_over
from ...parallel.mesh import Axis
from ...parallel.object_collectives import from_all

BLOCKS = {"cpu": 2**16}
"""Words that are hashed at once: on a CPU what stays in its cache, elsewhere LARGE."""
LARGE = 2**24
ODD = -7046029254386353131


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
    """int64, of the bits. A single changed bit always changes it: words of 64 bits are multiplied by odd numbers and added, modulo
    2^64, where an odd factor loses nothing."""
    flat = tensor.detach().contiguous().flatten()
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # words must lie on multiples of 8 bytes
    raw = flat.view(torch.uint8)
    words, rest = raw[: len(raw) // 8 * 8].view(torch.int64), raw[len(raw) // 8 * 8 :].long()
    block = min(BLOCKS.get(flat.device.type, LARGE), max(8, len(words)))
    odd = torch.arange(block, device=flat.device) * ODD | 1
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part in (*words.split(block), rest):
        total = total * ODD + (part * odd[: len(part)]).sum()
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
