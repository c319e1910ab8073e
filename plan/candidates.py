"""The layouts of a number of ranks: every combination of degrees that the rules of the configuration allow (train/config/rules/).

Degrees are powers of two. What no layout gains from is left out, and named in docs/plan.md.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from enum import Enum
from typing import Any, NamedTuple

from ..parallel.config import ContextExchange, Exchange, ParallelConfig, PipelineSchedule
from ..train.config.config import BatchConfig, Config
from ..train.config.rules.rules import layout_violations
from .workload import RECOMPUTED

STAGES = 16
"""The most ranks of a pipeline."""
LONG = 16384
"""Tokens of a sequence from which context parallelism is tried: below, a micro-batch of one sequence is small enough."""


class Candidate(NamedTuple):
    """A layout, with the micro-batch that it is for."""

    parallel: ParallelConfig
    batch: BatchConfig
    world: int

    @property
    def data(self) -> int:
        """Ranks that take different sequences."""
        p = self.parallel
        return self.world // (p.tensor * p.context * p.pipeline)

    def settings(self) -> dict[str, Any]:
        """Returns what differs from the defaults of `parallel`: names and plain values."""
        default = ParallelConfig()
        found = {field.name: getattr(self.parallel, field.name) for field in fields(ParallelConfig)}
        return {
            name: value.value if isinstance(value, Enum) else value
            for name, value in found.items()
            if value != getattr(default, name)
        }

    def overrides(self) -> list[str]:
        """Returns the words that `tokenyard train` takes."""
        words = [f"parallel.{name}={value}" for name, value in self.settings().items()]
        return [*words, f"batch.sequences={self.batch.sequences}", f"batch.micro={self.micro}"]

    @property
    def micro(self) -> int:
        """Sequences of a micro-batch."""
        return self.batch.micro or self.batch.sequences // self.data

    @property
    def micros(self) -> int:
        """Micro-batches of a step."""
        return self.batch.sequences // self.data // self.micro


def candidates(config: Config, world: int, node: int, fixed: Mapping[str, Any]) -> Iterator[list[Candidate]]:
    """Yields all legal layouts of `config` on `world` ranks, `node` of a host: lists whose members differ in the exchange alone.

    `fixed`: settings of `parallel` that the user gave, and batch.micro. Degrees come first: if those break a rule, what depends on
    them is not tried.
    """
    experts = config.model.moe.experts if _has_experts(config) else 1
    sizes = _powers(world)
    grid = {
        "tensor": [size for size in sizes if size <= node],
        "context": [size for size in sizes if size <= node] if config.sequence_length >= LONG else [1],
        "pipeline": [size for size in sizes if size <= min(STAGES, config.model.layers)],
        "expert": [size for size in sizes if experts % size == 0],
    }
    for degrees in _product(grid, fixed):
        data = world // (degrees["tensor"] * degrees["context"] * degrees["pipeline"])
        if not data or config.batch.sequences % data:
            continue
        shares = {
            "expert_tensor": [1, 2] if degrees["expert"] == experts > 1 else [1],
            "shard": sorted({1, min(node, data), data} if degrees["context"] == 1 else {1, data * degrees["context"]}),
        }
        for shared in _product(shares, fixed):
            first = replace(config.parallel, **degrees, **shared)
            if is_legal(config, first, config.batch, world):
                yield from _of_degrees(config, first, world, node, data, fixed)


def _of_degrees(
    config: Config, first: ParallelConfig, world: int, node: int, data: int, fixed: Mapping[str, Any]
) -> Iterator[list[Candidate]]:
    own, kinds = config.batch.sequences // data, PipelineSchedule
    micros = [config.batch.micro or own] if "micro" in fixed else [size for size in (1, 2, 4) if own % size == 0]
    schedules = [kinds["1f1b"], kinds["interleaved"], kinds["zbv"]] if first.pipeline > 1 else [kinds["1f1b"]]
    passes = {"context_exchange": list(ContextExchange) if first.context > 1 else [ContextExchange.gather]}
    for micro in micros:
        batch = replace(config.batch, micro=micro)
        zeros = [3, 2, 1] if first.shard > 1 and own > micro else [3]
        exchanges = [
            exchange
            for exchange in _product({"exchange": _exchanges(first, node)}, fixed)
            if is_legal(config, replace(first, **exchange), batch, world)
        ]
        for staged in _product({"pipeline_schedule": schedules, **passes}, fixed):
            if not is_legal(config, replace(first, **staged), batch, world):
                continue
            for kept in _product({"zero": zeros, "recompute": list(RECOMPUTED)}, fixed):
                group = [Candidate(replace(first, **staged, **kept, **exchange), batch, world) for exchange in exchanges]
                if group and is_legal(config, group[0].parallel, batch, world):
                    yield group


def _exchanges(p: ParallelConfig, node: int) -> list[Exchange]:
    if p.expert == 1:
        return [Exchange.plain]
    inside = p.expert * p.expert_tensor <= node
    return [Exchange.plain, Exchange.deduplicated, Exchange.symmetric if inside else Exchange.hierarchical]


def is_legal(config: Config, parallel: ParallelConfig, batch: BatchConfig, world: int) -> bool:
    """Whether no rule of the configuration forbids the layout."""
    return next(layout_violations(replace(config, parallel=parallel, batch=batch), world), None) is None


def _has_experts(config: Config) -> bool:
    return any(config.model.moe_layer(index) for index in range(config.model.layers))


def _powers(most: int) -> list[int]:
    """Returns the powers of two that divide `most`, and `most` itself."""
    return sorted({size for size in (2**exponent for exponent in range(most.bit_length())) if most % size == 0} | {most})


def _product(choices: Mapping[str, Sequence[Any]], fixed: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    names = list(choices)
    options = ([fixed[name]] if name in fixed else values for name, values in choices.items())
    for values in itertools.product(*options):
        yield dict(zip(names, values, strict=True))
