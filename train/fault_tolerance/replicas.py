"""Compares the replicas of the weights: a hash of each parameter, over the ranks that must hold the same values.

A bit that flips in one replica does not change the loss at once nor the gradient norm, so nothing else would show it in time.
"""

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from ...parallel.apply import Parallel, local
from ...parallel.collectives import all_reduce, max_over, stack_over
from ...parallel.mesh import Axis
from ...parallel.object_collectives import from_all
from ..config.config import OnDivergence
from ..engine import TorchEngine
from ..exit import ExitCode, RunStop
from ..logging.run_logger import RunLogger
from ..session import Session
from ..state import MOMENTS, optimizer_state

BLOCKS = {"cpu": 2**16}
"""Words that are hashed at once, by device: on a CPU as many as stay in its cache, elsewhere LARGE."""
LARGE = 2**24
ODD = -7046029254386353131
"""The odd factor of the hash."""


class Difference(NamedTuple):
    """A shard of a parameter whose replicas differ."""

    name: str
    ranks: tuple[int, ...]
    """Those without the value of the majority; all, if no value has a majority."""
    source: int | None
    """A rank with the value of the majority."""
    holders: tuple[int, ...]
    """The ranks that hold this shard."""


def differences(parallel: Parallel) -> list[Difference]:
    """Returns every shard whose replicas are not bit for bit the same; the list is the same on every rank. Collective.

    Communicates one small tensor for each set of ranks that holds replicas, and one number over all ranks.
    """
    mine = [difference for axis, names in _by_axis(parallel).items() for difference in _among(parallel, axis, names)]
    found = torch.tensor([float(len(mine))], device=parallel.device)
    if not max_over(found, parallel.mesh.everyone).item():
        return []
    return sorted({difference for each in from_all(mine) for difference in each}, key=lambda one: (one.name, one.holders))


def hash_of(tensor: Tensor) -> Tensor:
    """Returns an int64 hash of the bits, which a single changed bit always changes.

    Words of 64 bits are multiplied by odd numbers and added, modulo 2^64; a product with an odd factor is invertible.
    """
    flat = tensor.detach().contiguous().flatten()
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # words must be aligned to 8 bytes
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
    for name, sharded in parallel.parameters.items():
        if sharded.replicas.size > 1 and local(sharded.parameter).numel():
            found[sharded.replicas].append(name)
    return found


def _among(parallel: Parallel, axis: Axis, names: list[str]) -> list[Difference]:
    """Compares the ranks of one axis by the largest hash and the largest complement; if they differ, gathers all hashes."""
    hashes_P = torch.stack([hash_of(local(parallel.parameters[name].parameter)) for name in names])
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


class Replicas:
    """Compares the replicas every few steps and before a checkpoint, and repairs them.

    A rank whose weights differ gets those of the majority once; if it differs again, the run stops.
    """

    def __init__(self, session: Session, run_logger: RunLogger) -> None:
        self.session, self.run_logger = session, run_logger
        self.every = session.config.debug.replicas_every
        self.compared = session.step
        self.repaired: set[int] = set()
        """Ranks that were repaired before."""

    def compare(self) -> None:
        """Compares, unless this step was compared. Raises RunStop if replicas differ and cannot be repaired. Collective."""
        if not self.every or self.compared == self.session.step:
            return
        self.compared = self.session.step
        found = differences(self.session.parallel)
        if not found:
            return
        ranks = sorted({rank for difference in found for rank in difference.ranks})
        text = f"{found[0].name}{f' and {len(found) - 1} more' if len(found) > 1 else ''} of rank {', '.join(map(str, ranks))}"
        text += " differs from its replicas"
        again = self.repaired & set(ranks)
        possible = all(difference.source is not None for difference in found) and not again
        possible = possible and isinstance(self.session.engine, TorchEngine)
        repair = possible and self.session.config.debug.on_divergence is OnDivergence.repair
        tensors = [difference.name for difference in found]
        self.run_logger.log_event("replicas_differ", step=self.session.step, ranks=ranks, tensors=tensors, repaired=repair)
        self.run_logger.alert("replicas", f"{text}; {'copied from the others' if repair else 'the run stops'}")
        if not repair:
            why = "; it was so before, so the device may be broken" if again else ""
            raise RunStop(f"{text}{why}", ExitCode.ranks_differ, saves=False)
        self.repaired |= set(ranks)
        self.session.saver.wait_for_copies()  # after a skipped step the copies of a save may still read the weights
        for difference in found:
            self._repair(difference)

    def _repair(self, difference: Difference) -> None:
        """Copies weights and moments to the ranks that hold this shard: a sum of bytes, to which only the source adds its own."""
        assert difference.source is not None
        if self.session.parallel.mesh.rank not in difference.holders:
            return
        sharded = self.session.parallel.parameters[difference.name]
        moments = optimizer_state(self.session.engine.optimizer, sharded.parameter)
        for tensor in (sharded.parameter.detach(), *(moments[moment] for moment in MOMENTS if moment in moments)):
            raw = local(tensor).view(-1).view(torch.uint8)
            if self.session.parallel.mesh.rank != difference.source:
                raw.zero_()
            all_reduce(raw, sharded.replicas)
