"""Which layout of a cluster trains a model fastest, cheapest, or on the fewest GPUs: all legal ones are timed, those that fit kept.

Layouts are taken in the order of their predicted time. So the memory of few has to be computed, and each that does not fit is
faster than the slowest of the table: worth saying what it lacks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

from ..parallel.config import Recompute
from ..train.config.config import Config, ConfigError
from ..train.config.gpus import gpus
from .candidates import Candidate, candidates, is_legal
from .coefficients import Coefficients
from .gpu_cluster import Cluster
from .model_work import ModelWork
from .rank_memory import MemoryModel, RankMemory
from .step_time import StepTime, predict
from .workload import RECOMPUTED, StepBatch

TABLE = 10
"""Layouts that are shown."""
RESERVED = 2.5e9
"""Bytes of a GPU that tensors cannot have: context, buffers of NCCL, workspaces. The middle of what dry_report.py says."""
TIGHT = 0.9
"""The share of the usable memory above which fragmentation, or a hotter rank, may end the run."""


class Goal(Enum):
    fastest = "fastest"
    cheapest = "cheapest"
    fits = "fits"


class Fit(Enum):
    fits = "FITS"
    tight = "TIGHT"
    out = "OUT OF MEMORY"


class RankedLayout(NamedTuple):
    """A layout with what is predicted of it."""

    candidate: Candidate
    time: StepTime
    memory: RankMemory
    usable: float
    """Bytes that a GPU has for tensors."""

    @property
    def verdict(self) -> Fit:
        share = self.memory.peak / self.usable
        return Fit.out if share > 1 else Fit.tight if share > TIGHT else Fit.fits

    @property
    def gpu_seconds(self) -> float:
        """Of a step."""
        return self.time.likely * self.candidate.world


class Refused(NamedTuple):
    """Layouts of one kind that are too large, of which one needs least."""

    kind: str
    layouts: int
    fastest: float
    """Seconds of a step."""
    least: RankedLayout
    remedy: str
    """What would make it fit."""


class Found(NamedTuple):
    """Layouts that fit, the best first; and those that would be better and do not fit."""

    best: list[RankedLayout]
    refused: list[Refused]
    layouts: int
    """Layouts that were timed."""
    measured: int
    """Those of them whose memory was looked at."""


@dataclass
class Planner:
    """Searches the layouts of one model on a type of GPU."""

    config: Config
    cluster: Cluster
    hot: float = 1.0
    using: Coefficients | None = None
    """Replaces the committed coefficients of the step time."""

    def __post_init__(self) -> None:
        config, node = self.config, self.cluster.gpu.host
        self.work = ModelWork(config.model, config.sequence_length)
        self.memory = MemoryModel(
            config.model, config.precision, config.sequence_length, self.hot, node, config.optimizer.of_matrices
        )
        self.usable = self.cluster.gpu.memory_bytes - RESERVED

    def search(self, goal: Goal, fixed: Mapping[str, Any]) -> Found:
        """Returns the best layouts for `goal`. `fixed`: settings of `parallel` that stay, and batch.micro.

        Raises ConfigError if no layout is legal, or none fits.
        """
        if fixed.get("recompute", Recompute.none) not in RECOMPUTED:
            rule = "what it copies, and how long that takes, only the dry run and a GPU know"
            raise ConfigError.of("parallel.recompute", fixed["recompute"].value, rule, "parallel.recompute=block")
        timed = list[tuple[float, int, Candidate, StepTime]]()
        for world in self._worlds(goal):
            for group in candidates(self.config, world, self.cluster.gpu.host, fixed):
                times = [(self.time(each), each) for each in group]
                time, candidate = min(times, key=lambda each: each[0].likely)
                cost = {Goal.fastest: time.likely, Goal.cheapest: time.likely * world, Goal.fits: world * 1e9 + time.likely}[goal]
                timed.append((cost, len(timed), candidate, time))
        if not timed:
            self._raise_illegal(fixed)
        timed.sort()
        best, refused = list[RankedLayout](), dict[str, list[RankedLayout]]()
        leasts = dict[tuple[str, ...], RankMemory]()
        for _, _, candidate, time in timed:
            least = smallest(candidate)
            words = (str(least.world), *least.overrides())
            if words not in leasts:
                leasts[words] = self.plan(least, time).memory
            # What does not fit even with the least of recomputation and FSDP does not fit.
            hopeless = leasts[words].peak > self.usable
            planned = RankedLayout(candidate, time, leasts[words], self.usable) if hopeless else self.plan(candidate, time)
            if planned.verdict is Fit.out:
                refused.setdefault(kind_of_layout(candidate), []).append(planned)
            else:
                best.append(planned)
            if len(best) == TABLE:
                break
        classes = [self._refused(kind, each) for kind, each in refused.items()]
        return Found(best, sorted(classes, key=lambda each: each.fastest), len(timed), len(best) + sum(map(len, refused.values())))

    def time(self, candidate: Candidate) -> StepTime:
        """Returns the predicted time of a step."""
        cluster = replace(self.cluster, ranks=candidate.world)
        batch = StepBatch(candidate.batch.sequences, candidate.micro)
        return predict(self.work, candidate.parallel, batch, cluster, using=self.using)

    def plan(self, candidate: Candidate, time: StepTime | None = None) -> RankedLayout:
        """Returns the layout with its memory. That of layouts whose state alone is too large is a lower bound."""
        memory = self.memory.memory(candidate.parallel, candidate.world, candidate.batch.sequences, candidate.micro, self.usable)
        return RankedLayout(candidate, time or self.time(candidate), memory, self.usable)

    def _worlds(self, goal: Goal) -> list[int]:
        """The whole cluster; if fewer GPUs may be better, its halves down to a host too."""
        worlds = [self.cluster.ranks]
        while goal is not Goal.fastest and worlds[-1] % 2 == 0 and worlds[-1] > self.cluster.gpu.host:
            worlds.append(worlds[-1] // 2)
        return worlds

    def _refused(self, kind: str, layouts: list[RankedLayout]) -> Refused:
        least = min(layouts, key=lambda each: each.memory.peak)
        return Refused(kind, len(layouts), min(each.time.likely for each in layouts), least, self._remedy(least))

    def _remedy(self, planned: RankedLayout) -> str:
        """Returns the change that costs least time of those that make the layout fit, or the GPU that has room for it."""
        found = list[tuple[float, str]]()
        for words, candidate in _changes(planned.candidate):
            if is_legal(self.config, candidate.parallel, candidate.batch, candidate.world):
                changed = self.plan(candidate)
                if changed.verdict is not Fit.out:
                    found.append((changed.time.likely, f"{words}: {changed.memory.peak / 1e9:.1f} GB"))
        if found:
            return min(found)[1]
        rooms = [gpu for gpu in gpus().values() if gpu.memory_bytes - RESERVED >= planned.memory.peak]
        if rooms:
            gpu = min(rooms, key=lambda each: each.memory_bytes)
            return f"a GPU of {gpu.memory_bytes / 1e9:.0f} GB ({gpu.name})"
        return f"{planned.memory.peak / self.usable:.1f} times the memory"

    def _raise_illegal(self, fixed: Mapping[str, Any]) -> None:
        given = ", ".join(f"{name}={getattr(value, 'value', value)}" for name, value in fixed.items()) or "its sizes"
        rule = f"has no layout on {self.cluster} with {given} and batch.sequences={self.config.batch.sequences}"
        raise ConfigError(f"plan: the model {rule}; nearest valid: batch.sequences={16 * self.cluster.ranks}")


def smallest(candidate: Candidate) -> Candidate:
    """Returns the layout with the settings that need least memory: no weights and no activations are kept whole."""
    zero = 3 if candidate.parallel.shard > 1 else candidate.parallel.zero
    return candidate._replace(parallel=replace(candidate.parallel, recompute=Recompute.block, zero=zero))


def kind_of_layout(candidate: Candidate) -> str:
    """Returns what layouts that are refused together have in common."""
    p = candidate.parallel
    fsdp = f"ZeRO-{p.zero}" if p.shard > 1 else "no FSDP"
    return f"recompute={p.recompute.value}, {fsdp}, {'pipeline' if p.pipeline > 1 else 'no pipeline'}"


def _changes(candidate: Candidate) -> Iterator[tuple[str, Candidate]]:
    """Yields single changes of a layout that need less memory, in words."""
    p, batch, world = candidate
    for recompute in (Recompute.selective, Recompute.block):
        if p.recompute is Recompute.none or recompute is Recompute.block is not p.recompute:
            yield f"parallel.recompute={recompute.value}", candidate._replace(parallel=replace(p, recompute=recompute))
    if p.shard > 1 and p.zero < 3:
        yield "parallel.zero=3", candidate._replace(parallel=replace(p, zero=3))
    if candidate.micro > 1:
        yield f"batch.micro={candidate.micro // 2}", candidate._replace(batch=replace(batch, micro=candidate.micro // 2))
    for name in ("shard", "expert", "tensor", "pipeline"):
        degree = 2 * getattr(p, name)
        while degree <= world:
            yield f"parallel.{name}={degree}", candidate._replace(parallel=replace(p, **{name: degree}))
            degree *= 2
