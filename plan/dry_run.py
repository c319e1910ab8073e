"""One optimizer step of a rank as numbers: its memory, collectives, operators and host waits, without its device."""

import gc
from collections import Counter
from dataclasses import dataclass, field

from ..parallel.progress import name_layers
from ..train.config.config import Config
from .ledger import Call
from .memory_tracker import MemoryTracker
from .rank_step import dry_rank

STEPS = 2
"""The second step is measured: the first makes the state of the optimizer."""


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
    """What the second step of a rank takes."""

    peak_bytes: float
    peak_phase: str
    peak_layer: int | None
    purposes: dict[str, float]
    """Bytes at the peak by what they are for."""
    layers: dict[int | None, float]
    """Bytes at the peak by the layer that allocated them; None: no layer, weights, gradients and optimizer state."""
    phases: dict[str, float]
    """The most bytes in each phase of the step."""
    kept_bytes: float
    """What stays from step to step: weights, state of the optimizer, buffers of the exchange."""
    traffic: list[CallTotal]
    operators: dict[str, float]
    """Operators that do work on the device, by name. Each launches at least one kernel."""
    waits: dict[str, float] = field(default_factory=dict)
    """How often the host waits for the device, by the name of the read (docs/performance.md) or by `file:line`."""

    @property
    def launches(self) -> float:
        """At least so many kernels are launched: one for each operator and each collective."""
        return sum(self.operators.values()) + sum(each.count for each in self.traffic)


def step_facts(config: Config, rank: int, world: int) -> StepFacts:
    """Takes the steps of rank `rank` of `world`. The configuration has been validated, and its precision is known."""
    with dry_rank(config, rank, world) as dry, MemoryTracker(dry.parallel.device.type) as memory:
        model, optimizer = dry.parallel.model, dry.engine.optimizer
        name_layers(zip(model.block_indices, model.blocks, strict=True))
        memory.mark_step(model, optimizer)
        memory.mark_gradients_of(model)
        for _ in range(STEPS):
            memory.restart()
            for counter in (dry.ledger.calls, dry.ledger.operators, dry.ledger.waits, dry.waits):
                counter.clear()
            dry.step()
            memory.mark_step(model, optimizer)
        memory.end()
        (phase, layer), peak = memory.peak
        phases: dict[str, float] = {
            name: max(each.bytes for (of, _), each in memory.peaks.items() if of == name) for name, _ in memory.peaks
        }
        traffic = traffic_of(dry.ledger.calls, node_size(config, world))
        operators: dict[str, float] = dict(dry.ledger.operators)
        waits: dict[str, float] = {**dry.waits, **dry.ledger.waits}
        optimizer.zero_grad()
        gc.collect()
        kept = memory.now
    return StepFacts(
        peak.bytes, phase, layer, dict(peak.by_purpose()), dict(peak.by_layer()), phases, kept, traffic, operators, waits
    )


def node_size(config: Config, world: int) -> int:
    """Returns the ranks of a node: parallel.node_ranks, or else those that launch.ranks starts on each, or 8."""
    launched = config.launch.ranks if config.launch.ranks > 1 else 8
    return min(world, config.parallel.node_ranks or launched)


def traffic_of(calls: Counter[Call], node: int) -> list[CallTotal]:
    """Adds up calls that differ only in the members of their groups. `node`: ranks of a node, which are neighbours."""
    found: dict[tuple[str, str, int, str, str], CallTotal] = {}
    for call, count in calls.items():
        link = "in node" if len({rank // node for rank in call.ranks}) == 1 else "between nodes"
        key = call.phase, call.kind, len(call.ranks), link, call.dtype.removeprefix("torch.")
        each = found.setdefault(key, CallTotal(*key))
        each.count += count
        each.bytes += count * call.bytes
    return sorted(found.values(), key=lambda each: -each.bytes)
