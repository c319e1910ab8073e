"""One optimizer step of a rank as numbers: its memory, collectives, operators and host waits, without its device."""

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..parallel.config import Exchange, PipelineSchedule
from ..parallel.progress import name_layers
from ..train.config.config import Config
from .depth import NONE, Depth, Repeated, SmallRun, depth_of, runs_for
from .ledger import Call
from .memory_tracker import MemoryPeak, MemoryTracker, Point
from .rank_step import BEGIN, END, DryRank, dry_rank, units_begin


@dataclass
class CallTotal:
    """Collectives of a kind in a phase of the step, over groups of one size."""

    phase: str
    kind: str
    ranks: int
    link: str
    """`in node` or `between nodes`: whether all ranks of the group are in one node."""
    dtype: str
    count: float = 0
    bytes: float = 0
    """Of the larger side of each, added up."""


@dataclass
class StepFacts:
    """What a step of a rank takes."""

    points: dict[Point, dict[str, float]]
    """Bytes by what they are for, when most are alive in each phase and layer."""
    kept_bytes: float
    """What stays from step to step: weights, state of the optimizer, buffers of the exchange."""
    traffic: list[CallTotal]
    operators: dict[str, float]
    """Operators that do work on the device, by name. Each launches at least one kernel."""
    waits: dict[str, float] = field(default_factory=dict)
    """How often the host waits for the device, by the name of the read (docs/performance.md) or by `file:line`."""

    @property
    def peak_point(self) -> Point:
        """The phase and the layer in which the rank has most memory: the first of several."""
        return max(self.points, key=lambda point: sum(self.points[point].values()))

    @property
    def purposes(self) -> dict[str, float]:
        """Bytes at the peak by what they are for."""
        return self.points[self.peak_point]

    @property
    def peak_bytes(self) -> float:
        return sum(self.purposes.values())

    @property
    def launches(self) -> float:
        """At least so many kernels are launched: one for each operator and each collective."""
        return sum(self.operators.values()) + sum(each.count for each in self.traffic)


class StepRecord(NamedTuple):
    """A step that was taken."""

    peaks: dict[Point, MemoryPeak]
    kept_bytes: int
    calls: Counter[Call]
    operators: Counter[str]
    waits: Counter[str]


def step_facts(config: Config, rank: int, world: int, hot: float = 1.0, in_full: bool = False) -> StepFacts:
    """Returns what a step of rank `rank` of `world` takes. The configuration has been validated, and its precision is known.

    `hot`: rows that the rank's experts receive, over their number at an even load. `in_full`: all layers and micro-batches are run;
    otherwise few of each (plan/depth.py).
    """
    node = node_size(config, world)
    if config.parallel.exchange is Exchange.hierarchical:
        config.parallel.node_ranks = node  # a launcher would say it
    runs, period = ([SmallRun(config, 1)], 1) if in_full else runs_for(config, rank, world)
    smallest = min((run.config for run in runs), key=lambda each: each.model.layers)
    found, whole = [], depth_of(config, rank, world, smallest, period)
    for run in runs:
        with dry_rank(run.config, rank, world, hot) as dry:
            depth = whole if len(runs) == 1 else depth_of(run.config, rank, world, smallest, period)
            found.append((run.factor, take_step(dry, run.repeated), depth))
    return StepFacts(
        _points(found, whole) if len(runs) > 1 else {point: dict(peak.by_purpose()) for point, peak in found[0][1].peaks.items()},
        sum(factor * record.kept_bytes for factor, record, _ in found),
        traffic_of(_sum([(factor, record.calls) for factor, record, _ in found]), node),
        _sum([(factor, record.operators) for factor, record, _ in found]),
        _sum([(factor, record.waits) for factor, record, _ in found]),
    )


def take_step(rank: DryRank, repeated: Repeated = NONE) -> StepRecord:
    """Takes a step, after one of as few micro-batches as possible: what that makes for the next ones is there.

    What happens in the `repeated` units is counted so many times more.
    """
    model, optimizer, ledger, parallel = rank.parallel.model, rank.engine.optimizer, rank.ledger, rank.config.parallel
    name_layers(zip(model.block_indices, model.blocks, strict=True))
    few = parallel.pipeline if parallel.pipeline_schedule is PipelineSchedule["interleaved"] else 1
    marks = dict[int, tuple[int, list[Counter[Any]]]]()

    def step(micro_batches: int | None, held: Callable[[], int]) -> list[Counter[Any]]:
        """Returns what was counted, and leaves what had been at each mark in `marks`."""
        for counter in (ledger.calls, ledger.operators, ledger.waits, rank.waits):
            counter.clear()

        def counted() -> list[Counter[Any]]:
            return [ledger.calls.copy(), ledger.operators.copy(), rank.waits + ledger.waits]

        def mark(unit: int) -> None:
            if unit in (BEGIN, END, *repeated[:2]):
                marks[unit] = held(), counted()

        with units_begin(rank.parallel, mark):
            rank.step(micro_batches)
        return counted()

    rank.step(few)
    outside = _less(step(few, lambda: 0), marks) if repeated.times else []
    optimizer.zero_grad()
    gc.collect()
    with MemoryTracker(rank.parallel.device.type) as memory:
        memory.mark_step(model, optimizer)
        memory.mark_gradients_of(model)
        numbers = step(None, lambda: memory.now)
        memory.mark_step(model, optimizer)
        memory.end()
        if repeated.times:
            (before, first), (after, second) = marks[repeated.start], marks[repeated.stop]
            memory.grow(repeated.times * (after - before))
            more = _less(numbers, marks)
            for number, one, other, alone, together in zip(numbers, first, second, outside, more, strict=True):
                for key in {*other, *together}:
                    each = (together[key] - alone[key]) * repeated.micros // (rank.micro_batches - few)
                    number[key] += repeated.times * (other[key] - one[key] + each)
        calls, operators, waits = numbers
        optimizer.zero_grad()
        gc.collect()
        return StepRecord(memory.peaks, memory.now, calls, operators, waits)


def _less(numbers: list[Counter[Any]], marks: dict[int, tuple[int, list[Counter[Any]]]]) -> list[Counter[Any]]:
    """Returns what was counted outside of the passes through the model."""
    found = list[Counter[Any]]()
    for number, begin, end in zip(numbers, marks[BEGIN][1], marks[END][1], strict=True):
        rest = Counter(number)
        rest.subtract(end)
        rest.update(begin)
        found.append(rest)
    return found


def _points(found: list[tuple[int, StepRecord, Depth]], whole: Depth) -> dict[Point, dict[str, float]]:
    """Adds up the memory at the points that all runs have, each times its factor."""
    by_place: list[tuple[int, dict[Any, Counter[str]]]] = []
    for factor, record, depth in found:
        places = {(phase, depth.place(layer)): peak.by_purpose() for (phase, layer), peak in record.peaks.items()}
        by_place.append((factor, places))
    common = [point for point in by_place[0][1] if point[1] != "between" and all(point in places for _, places in by_place)]
    return {
        (phase, whole.layer(place)): _sum([(factor, places[phase, place]) for factor, places in by_place])
        for phase, place in common
    }


def _sum(parts: list[tuple[int, Counter[Any]]]) -> dict[Any, float]:
    """Returns the sum of each number times its factor, without zeros."""
    total = dict[Any, float]()
    for factor, numbers in parts:
        for key, number in numbers.items():
            total[key] = total.get(key, 0) + factor * number
    return {key: number for key, number in total.items() if number}


def node_size(config: Config, world: int) -> int:
    """Returns the ranks of a node: parallel.node_ranks, or else those that launch.ranks starts on each, or 8."""
    launched = config.launch.ranks if config.launch.ranks > 1 else 8
    return min(world, config.parallel.node_ranks or launched)


def traffic_of(calls: dict[Call, float], node: int) -> list[CallTotal]:
    """Adds up calls that differ only in the members of their groups. `node`: ranks of a node, which are neighbours."""
    found: dict[tuple[str, str, int, str, str], CallTotal] = {}
    for call, count in calls.items():
        link = "in node" if len({rank // node for rank in call.ranks}) == 1 else "between nodes"
        key = call.phase, call.kind, len(call.ranks), link, call.dtype.removeprefix("torch.")
        each = found.setdefault(key, CallTotal(*key))
        each.count += count
        each.bytes += count * call.bytes
    return sorted(found.values(), key=lambda each: -each.bytes)
