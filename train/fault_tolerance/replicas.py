"""Whether the ranks that must hold the same weights do: a hash of each parameter, compared over those ranks.

A bit that flips in one replica changes no loss at once and no norm of a gradient; nobody would know before the model is bad.
"""

from collections import defaultdict
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...parallel.apply import Parallel, local
from ...parallel.collectives import max_over, stack_over
from ...parallel.mesh import Axis
from ...parallel.object_collectives import from_all
from ..config.config import OnDivergence
from ..engine import TorchEngine
from ..exit import ExitCode, RunStop
from ..logging.run_logger import Reporter
from ..session import Session
from ..state import MOMENTS, optimizer_state

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
    for name, sharded in parallel.parameters.items():
        if sharded.replicas.size > 1 and local(sharded.parameter).numel():
            found[sharded.replicas].append(name)
    return found


def _among(parallel: Parallel, axis: Axis, names: list[str]) -> list[Difference]:
    """Of the ranks of one axis: the largest and, of the complements, the smallest hash; then, if they differ, who has which."""
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


# What a run does when copies of a weight differ: copies them from the majority once, and stops if that does not help.


class Replicas:
    """Compares them every few steps, and before a checkpoint is written."""

    def __init__(self, session: Session, reporter: Reporter) -> None:
        self.session, self.reporter = session, reporter
        self.every = session.config.debug.replicas_every
        self.compared = session.step
        self.repaired: set[int] = set()
        """Ranks that had a wrong value before."""

    def due(self) -> bool:
        return self.every > 0 and self.session.step % self.every == 0

    def compare(self) -> None:
        """RunStop if they differ and cannot be made equal. Collective."""
        if not self.every or self.compared == self.session.step:
            return
        self.compared = self.session.step
        found = differences(self.session.parallel)
        if not found:
            return
        ranks = sorted({rank for difference in found for rank in difference.ranks})
        text = f"{found[0].name}{f' and {len(found) - 1} more' if len(found) > 1 else ''} of rank {', '.join(map(str, ranks))}"
        text += " is not what its copies are"
        again = self.repaired & set(ranks)
        possible = all(difference.source is not None for difference in found) and not again
        possible = possible and isinstance(self.session.engine, TorchEngine)
        repair = possible and self.session.config.debug.on_divergence is OnDivergence.repair
        self.reporter.event(
            "replicas_differ", step=self.session.step, ranks=ranks, tensors=[d.name for d in found], repaired=repair
        )
        self.reporter.alert("replicas", f"{text}; {'copied from the others' if repair else 'the run stops'}")
        if not repair:
            why = "; it was so before, so the device may be broken" if again else ""
            raise RunStop(f"{text}{why}", ExitCode.ranks_differ, saves=False)
        self.repaired |= set(ranks)
        self.session.saver.wait_for_copies()  # a step that was skipped has not waited for the copies of a save
        for difference in found:
            self._repair(difference)

    def _repair(self, difference: Difference) -> None:
        """Weights and moments, on the ranks that hold copies of this piece."""
        assert difference.source is not None
        if self.session.parallel.mesh.rank not in difference.copies:
            return
        sharded = self.session.parallel.parameters[difference.name]
        moments = optimizer_state(self.session.engine.optimizer, sharded.parameter)
        for tensor in (sharded.parameter.detach(), *(moments[moment] for moment in MOMENTS)):
            dist.broadcast(local(tensor), difference.source, group=sharded.replicas.group)
