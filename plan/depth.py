"""A run of few layers and few micro-batches for one of many: what a step takes is linear in both, once they have their pattern.

Layers repeat with a period after the first ones (DeepSeek's are dense, gpt-oss alternates windows). Two depths that differ by one
period, of which the smaller has every kind of neighbour, give the memory at each point of the step for any number of them; points
are counted from both ends of a stage, between which memory rises or falls evenly. The outermost layers have fewer neighbours
(nothing is gathered or reduced beside them), so two periods are counted from each end.

Micro-batches need one run: the first finds no gradients, the last reduces them, those between are equal. So the actions of a rank
for many are those for few with one part, of middle micro-batches, repeated, which the schedules themselves say.
"""

import copy
from typing import NamedTuple

from ..moe.config import ModelConfig
from ..parallel.config import PipelineSchedule
from ..parallel.layout import data_ranks
from ..parallel.pipeline.pairs import Unit, units
from ..parallel.pipeline.schedule import BACKWARD, FORWARD, Action
from ..parallel.pipeline.stages import cut_layers, layers_on
from ..train.config.config import Config

Place = tuple[int, int] | None
"""A layer as (stage, offset): from the first layer of the stage, or negative from behind its last one; None: no layer."""
MTP = -1
"""The stage of the modules of multi-token prediction in a Place."""


ENDS = 2
"""Periods of layers at each end of a stage that are points of their own."""


class Repeated(NamedTuple):
    """Units of a rank's schedule, from `start` to before `stop`, that more micro-batches repeat `times` times."""

    start: int
    stop: int
    times: int
    micros: int = 0
    """Micro-batches of the part."""


NONE = Repeated(0, 0, 0)


class SmallRun(NamedTuple):
    """A configuration to run, and the factor of its numbers in those of the configuration that was asked for."""

    config: Config
    factor: int
    repeated: Repeated = NONE


class Depth(NamedTuple):
    """Layers of a rank's stages in a run, by which its points are found in another depth."""

    stages: dict[int, range]
    layers: int
    """Of the model."""
    ends: int
    """Layers at the end of a stage that are counted from behind."""
    starts: dict[int, int]
    """Layers at the start of each stage that are counted from the front. Those between are in no point."""

    def place(self, layer: int | None) -> Place | str:
        """Returns the place of a layer; `between` for one that has none."""
        if layer is None:
            return None
        if layer >= self.layers:
            return MTP, layer - self.layers
        stage, inside = next(item for item in self.stages.items() if layer in item[1])
        if layer - inside.start < self.starts[stage]:
            return stage, layer - inside.start
        behind = layer - inside.stop
        return (stage, behind) if -behind <= self.ends else "between"

    def layer(self, place: Place) -> int | None:
        """Returns the layer at a place."""
        if place is None:
            return None
        stage, offset = place
        if stage == MTP:
            return self.layers + offset
        return self.stages[stage].start + offset if offset >= 0 else self.stages[stage].stop + offset


def runs_for(config: Config, rank: int, world: int) -> tuple[list[SmallRun], int]:
    """Returns the runs whose numbers, times their factors, add up to those of `config`, and the period of the layers.

    One run with all layers if two depths would be as much work.
    """
    period, removed = removable_layers(config, rank, world)
    depths = [(removed, 1 - removed // period), (removed - period, removed // period)] if removed else [(0, 1)]
    micro_batches, repeated = few_micro_batches(config, rank, world)
    found = [SmallRun(shrunk(config, rank, world, less, micro_batches), factor, repeated) for less, factor in depths]
    return [run for run in found if run.factor], period


def depth_of(config: Config, rank: int, world: int, smallest: Config, period: int) -> Depth:
    """Returns the depth of `config`, of whose runs `smallest` has the fewest layers."""
    ends = ENDS * period
    starts = {stage: max(0, len(inside) - ends) for stage, inside in own_stages(smallest, rank, world).items()}
    return Depth(own_stages(config, rank, world), config.model.layers, ends, starts)


def own_stages(config: Config, rank: int, world: int) -> dict[int, range]:
    """Returns the layers of each stage of a rank; of stage 0, all of them, without a pipeline."""
    if config.parallel.pipeline == 1:
        return {0: range(config.model.layers)}
    return layers_on(cut_layers(config.model, config.parallel), config.parallel, rank // (world // config.parallel.pipeline))


def removable_layers(config: Config, rank: int, world: int) -> tuple[int, int]:
    """Returns the period of the layers, and how many may be taken out of each stage of this rank: a multiple of it.

    What remains of a stage has two periods for each end besides the layers before the pattern. Stages are cut where they are, so
    with a pattern of several layers none is taken out of them. None is either if two runs of what remains, and of one period more,
    have as many layers as all.
    """
    first, period = pattern(config.model)
    stages = own_stages(config, rank, world).values()
    if config.parallel.pipeline > 1 and period > 1:
        return period, 0
    spare = min((len(inside) - max(0, first - inside.start) - 2 * ENDS * period for inside in stages if len(inside)), default=0)
    removed, layers = max(0, spare // period * period), sum(map(len, stages))
    work = 2 * (layers - removed * len(stages)) + period * len(stages)
    return period, removed if work < layers else 0


def pattern(model: ModelConfig) -> tuple[int, int]:
    """Returns the first layer from which on kinds of layers repeat, and their period: those with the smallest sum of both."""
    kinds = [model.layer_kind(index) for index in range(model.layers)]
    found = []
    for period in range(1, max(2, model.layers // 2)):
        differing = [index for index in range(model.layers - period) if kinds[index] != kinds[index + period]]
        found.append((differing[-1] + 1 if differing else 0, period))
    return min(found, key=lambda item: (item[0] + 2 * item[1], item[1]))


def micro_batches_of(config: Config, world: int) -> int:
    """Returns the micro-batches of a step on one rank."""
    data = data_ranks(config.parallel, world)
    return config.batch.sequences // (data * (config.batch.micro or config.batch.sequences // data))


def few_micro_batches(config: Config, rank: int, world: int) -> tuple[int, Repeated]:
    """Returns the fewest micro-batches from whose actions those of all follow, and how.

    interleaved takes multiples of the ranks.
    """
    parallel, micros = config.parallel, micro_batches_of(config, world)
    period = parallel.pipeline if parallel.pipeline_schedule is PipelineSchedule["interleaved"] and parallel.pipeline > 1 else 1
    wanted = list(map(_without_micro, units_of(config, rank, world, micros)))
    for few in range(2 * period, micros, period):
        actions = units_of(config, rank, world, few + period)
        shape = list(map(_without_micro, actions))
        length = len(shape) - len(units_of(config, rank, world, few))
        times = (micros - few - period) // period
        for start in range(len(shape) - length + 1):
            stop = start + length
            middle = all(0 < action.micro < few + period - 1 for unit in actions[start:stop] for action in unit)
            if middle and times > 0 and [*shape[:stop], *times * shape[start:stop], *shape[stop:]] == wanted:
                return few + period, Repeated(start, stop, times, period)
    return micros, NONE


def units_of(config: Config, rank: int, world: int, micros: int) -> list[Unit]:
    """Returns what a rank does for so many micro-batches, in order. Without a pipeline the passes of one are a unit."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return [(Action(FORWARD, 0, micro), Action(BACKWARD, 0, micro)) for micro in range(micros)]
    chunks = len(own_stages(config, rank, world))
    place = rank // (world // parallel.pipeline)
    return units(parallel.pipeline_schedule, parallel.pipeline, chunks, micros, parallel.pipeline_overlap)[place]


def _without_micro(unit: Unit) -> tuple[tuple[str, int], ...]:
    return tuple((action.kind, action.stage) for action in unit)


def shrunk(config: Config, rank: int, world: int, less: int, micro_batches: int) -> Config:
    """Returns `config` with `less` layers fewer in each stage of this rank, and with so many micro-batches."""
    config, mine = copy.deepcopy(config), own_stages(config, rank, world)
    data = data_ranks(config.parallel, world)
    config.batch.micro = config.batch.micro or config.batch.sequences // data
    config.batch.sequences = micro_batches * config.batch.micro * data
    model, before = config.model, config.model.layers
    if config.parallel.pipeline > 1:
        cut = cut_layers(model, config.parallel)
        taken = {stage: less if stage in mine and len(inside) else 0 for stage, inside in enumerate(cut)}
        config.parallel.pipeline_layers = [len(inside) - taken[stage] for stage, inside in enumerate(cut)]
        less = sum(taken.values())
    model.layers -= less
    for listed in (model.dense_layers, model.attention.linear_layers, model.attention.full_layers):
        listed[:] = [index if index < model.layers else index - less for index in listed if not model.layers <= index < before]
    return config
