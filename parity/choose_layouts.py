"""The layouts to compare: those that the user lists, or all that the rules of the configuration allow."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ..data.config import TokenizerConfig
from ..moe.config import MoEConfig, Scope, Selection
from ..parallel.config import Exchange, Overflow, ParallelConfig, PipelineSchedule
from ..parallel.layout import data_ranks, dense_ranks
from ..train.config.compose import compose
from ..train.config.config import BatchConfig, Config, ConfigError, LaunchConfig, Precision
from ..train.config.rules.rules import violations
from ..train.config.schema import written
from ..train.config.validate import nearest_valid

DEGREES = ("shard", "tensor", "expert", "expert_tensor", "context", "pipeline")
"""The settings of `parallel` that are degrees."""


@dataclass(frozen=True)
class Layout:
    """A layout of `ranks` ranks. The ranks beyond the degrees of `parallel` are replicas."""

    ranks: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    accumulation: int = 1
    """Micro-batches of each rank in a step."""

    @property
    def replicate(self) -> int:
        return self.ranks // self.parallel.pipeline // dense_ranks(self.parallel)

    @property
    def data_ranks(self) -> int:
        """The ranks with different rows of the batch."""
        return data_ranks(self.parallel, self.ranks)

    @property
    def text(self) -> str:
        """The layout as in parity.layouts, without defaults."""
        changed = {"replicate": self.replicate, **_settings(self.parallel), "accumulation": self.accumulation}
        default = {"replicate": 1, **_settings(ParallelConfig()), "accumulation": 1}
        words = (name if value is True else f"{name}={written(value)}" for name, value in changed.items() if value != default[name])
        return " ".join(words) or "one process"

    def applied(self, config: Config) -> Config:
        """Returns `config` on this layout."""
        micro = max(1, config.batch.sequences // self.data_ranks // self.accumulation)
        batch = BatchConfig(config.batch.sequences, micro)
        parallel = dataclasses.replace(self.parallel, exchange_dtype=config.parallel.exchange_dtype)
        if parallel.exchange is Exchange.symmetric and parallel.exchange_overflow is not Overflow.repair:
            # One process has room for everything.
            parallel = dataclasses.replace(parallel, exchange_rows=float(parallel.expert))
        return dataclasses.replace(config, parallel=parallel, batch=batch)


def prepare_config(config: Config) -> Config:
    """Returns `config` in fp64 and without corpus, tokenizer and launcher. Raises ConfigError for what cannot be compared."""
    _refuse_rank_scopes(config.model.moe)
    neutral = TokenizerConfig(path="none")  # ids are random: no tokenizer has to fit the vocabulary
    parallel = ParallelConfig(exchange_dtype=config.parallel.exchange_dtype)  # which changes numbers, on every layout alike
    changed = dataclasses.replace(
        config, precision=Precision.fp64, compile=False, tokenizer=neutral, launch=LaunchConfig(), parallel=parallel
    )
    refuse_broken(changed, 1)
    return changed


def refuse_broken(config: Config, world: int) -> None:
    """Raises ConfigError for the first rule that `config` breaks on `world` ranks."""
    broken = next(violations(config, world), None)
    if broken is not None:
        value: Any = config
        for name in broken.key.split("."):
            value = getattr(value, name)
        raise ConfigError.of(broken.key, written(value), broken.rule, nearest_valid(config, world, broken))


def is_legal(config: Config, layout: Layout) -> bool:
    """Whether no rule forbids the layout, and each rank has a sequence for every micro-batch."""
    applied = layout.applied(config)
    if next(violations(applied, layout.ranks), None) is not None:
        return False
    return applied.batch.sequences == (applied.batch.micro or 0) * layout.accumulation * layout.data_ranks


def all_layouts(config: Config, ranks: int) -> list[Layout]:
    """Returns all legal splits of 1, 2, 4, ... `ranks` ranks, and each option on the split of each size that mixes most degrees."""
    worlds = [1 << power for power in range(ranks.bit_length())]
    found: list[Layout] = []
    for world in worlds:
        splits = [layout for layout in _splits(world) if is_legal(config, layout)]
        found += [layout for layout in splits if layout != Layout()]
        degrees = [sum(getattr(layout.parallel, name, 1) > 1 for name in DEGREES) for layout in splits]
        ranked = sorted(zip(degrees, splits, strict=True), key=lambda pair: (pair[0], pair[1].parallel.expert), reverse=True)
        for accumulation, changes in options(most=world == worlds[-1]):
            variants = (Layout(world, dataclasses.replace(base.parallel, **changes), accumulation) for _, base in ranked)
            found += itertools.islice((layout for layout in variants if is_legal(config, layout)), 1)
    return found


def options(most: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Pairs of micro-batches and changed settings: each switch and choice of `parallel`, accumulation, and (if `most`) both."""
    yield 2, {}
    for name, default in _settings(ParallelConfig()).items():
        for value in [] if name in DEGREES else _others(default):
            for needed in _needed_by(name, value):
                yield 1, {name: value} | needed
                if most:
                    yield 2, {name: value} | needed


def _needed_by(name: str, value: Any) -> list[dict[str, Any]]:
    """Returns what other settings a setting may need to be legal, of which the rules decide."""
    if name == "pipeline_overlap":
        return [{"pipeline_schedule": schedule} for schedule in PipelineSchedule]
    return [{"node_ranks": 2} if value is Exchange.hierarchical else {}]


def _others(default: Any) -> list[Any]:
    """Returns the other values of a switch, a choice or a small number; the rules decide which are legal."""
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, Enum):
        return [value for value in type(default) if value is not default]
    return [value for value in range(1, default + 2) if value != default] if isinstance(default, int) else []


def parse_layouts(text: str) -> list[Layout]:
    """Parses `[tensor=2 expert=2, shard=4 recompute]`. Raises ConfigError for an invalid layout."""
    parts = [" ".join(part.split()) for part in text[1:-1].split(",") if part.strip()]
    if not parts or text[:1] + text[-1:] != "[]":
        raise ConfigError.of("parity.layouts", text, "must be auto or a list of layouts", "parity.layouts='[shard=2, expert=2]'")
    return [_read(part) for part in parts]


def _read(text: str) -> Layout:
    """Parses one layout: `replicate`, `accumulation`, and settings of `parallel`; a switch needs no value."""
    pairs = dict((word if "=" in word else f"{word}=true").split("=", 1) for word in text.split())
    own = {name: pairs.pop(name, "1") for name in ("replicate", "accumulation")}
    for name, value in own.items():
        if not value.isdecimal() or int(value) < 1:
            raise ConfigError.of("parity.layouts", f"[{text}]", f"{name} must be an integer from 1 on", f"[{name}=2]")
    try:
        parallel = compose([f"parallel.{name}={value}" for name, value in pairs.items()]).parallel
    except ConfigError as error:
        raise ConfigError(f"parity.layouts=[{text}]: {error}") from error
    ranks = int(own["replicate"]) * dense_ranks(parallel) * parallel.pipeline
    return Layout(ranks, parallel, int(own["accumulation"]))


MOST_RANKS = 8
"""The most ranks that a layout is extended to."""


def fit_layout(config: Config, layout: Layout) -> Layout:
    """Returns `layout` on as many ranks as its experts need. Raises ConfigError if no number of ranks is legal."""
    unit = layout.ranks
    sizes = [dataclasses.replace(layout, ranks=unit * factor) for factor in range(1, max(2, MOST_RANKS // unit + 1))]
    for candidate in sizes if layout.replicate == 1 else sizes[:1]:
        if is_legal(config, candidate):
            return candidate
    wide = max(sizes[0].ranks, *(getattr(layout.parallel, name, 1) for name in DEGREES))
    at_fault = dataclasses.replace(layout, ranks=wide)
    try:
        refuse_broken(at_fault.applied(config), at_fault.ranks)
    except ConfigError as error:
        raise ConfigError(f"parity.layouts=[{layout.text}]: {error}") from error
    rule = f"batch.sequences={config.batch.sequences} does not divide into its data ranks and micro-batches"
    raise ConfigError.of("parity.layouts", f"[{layout.text}]", rule, f"batch.sequences={2 * wide * layout.accumulation}")


def sees_accumulation(config: MoEConfig) -> bool:
    """Whether something is counted over the global micro-batch, so that accumulation changes the result."""
    return Scope.batch in (config.balance.scope, config.capacity.scope)


def _splits(world: int) -> Iterator[Layout]:
    degrees = [name for name in DEGREES if hasattr(ParallelConfig, name)]
    divisors = [degree for degree in range(1, world + 1) if world % degree == 0]
    for values in itertools.product(divisors, repeat=len(degrees)):
        parallel = dataclasses.replace(ParallelConfig(), **dict(zip(degrees, values, strict=True)))
        if world % (dense_ranks(parallel) * parallel.pipeline) == 0:
            yield Layout(world, parallel)


def _settings(parallel: ParallelConfig) -> dict[str, Any]:
    """Returns the settings that must not change a number and could."""
    return {name: value for name, value in vars(parallel).items() if not isinstance(value, float) and name != "exchange_dtype"}


def _refuse_rank_scopes(config: MoEConfig) -> None:
    balance, capacity = config.balance, config.capacity
    devices = balance.device_coefficient or balance.communication_coefficient
    counted = balance.coefficient or devices or balance.importance_coefficient or config.router.selection is Selection.sinkhorn
    rule = "counts what one rank has, so no two layouts can agree"
    if balance.scope is Scope.rank and counted:
        raise ConfigError.of("model.moe.balance.scope", "rank", rule, "model.moe.balance.scope=sequence")
    if capacity.scope is Scope.rank and (capacity.factor is not None or capacity.schedule):
        raise ConfigError.of("model.moe.capacity.scope", "rank", rule, "model.moe.capacity.scope=sequence")
