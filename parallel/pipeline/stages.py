"""Cuts the layers of a model into the stages of a pipeline. Does not import torch: layouts are computed before anything is built.

The first stage has the embedding, the last one the norm, the head and multi-token prediction; no layer if these cost that much.
Names are those of the whole model on every stage.
"""

import itertools
import math
from functools import cache

from ...moe.config import ModelConfig
from ...moe.param_count import flops_by_layer
from ...moe.param_shapes import Shapes, shapes
from ..config import ParallelConfig
from .schedule import place_of, stages_at

COST_LENGTH = 4096
"""Tokens of the sequences for which stages are balanced, so that a longer sequence_length does not move a layer to another rank."""


def cut_layers(config: ModelConfig, parallel: ParallelConfig) -> list[range]:
    """Returns the layers of each stage, as `pipeline_layers` says or by cost. The rules of the configuration have been checked."""
    stages = parallel.pipeline_stages
    sizes = parallel.pipeline_layers or _cheapest(*_costs(config, parallel), stages)
    ends = list(itertools.accumulate(sizes))
    assert len(sizes) == stages and ends[-1] == config.layers, (sizes, config.layers)
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def layers_on(cut: list[range], parallel: ParallelConfig, rank: int) -> dict[int, range]:
    """Returns the layers of each stage on rank `rank` of a pipeline, by stage."""
    return {stage: cut[stage] for stage in stages_at(parallel.pipeline_schedule, parallel.pipeline, len(cut), rank)}


def has_embedding(config: ModelConfig, first: bool, last: bool) -> bool:
    """Whether a rank that has the first stage, or the last one, holds the embedding. The last has a copy for a tied head and for
    multi-token prediction, unless it is the first stage's rank; both copies get the same gradient.
    """
    return first or (last and (config.tie_embeddings or config.mtp_depth > 0))


def copies_embedding(config: ModelConfig, parallel: ParallelConfig) -> bool:
    """Whether the rank of the last stage is not that of the first, and has a copy of the embedding."""
    last = place_of(parallel.pipeline_schedule, parallel.pipeline, parallel.pipeline_stages - 1)
    return last != 0 and has_embedding(config, first=False, last=True)


def held_on(config: ModelConfig, cut: list[range], parallel: ParallelConfig, rank: int, found: Shapes) -> Shapes:
    """Returns those of the parameters `found` that rank `rank` of a pipeline holds."""
    mine = layers_on(cut, parallel, rank)
    first, last = 0 in mine, len(cut) - 1 in mine
    layers = {str(index) for inside in mine.values() for index in inside}

    def held(name: str) -> bool:
        part, _, rest = name.partition(".")
        if part == "layers":
            return rest.partition(".")[0] in layers
        return has_embedding(config, first, last) if part == "embedding" else last

    return {name: shape for name, shape in found.items() if held(name)}


def _costs(config: ModelConfig, parallel: ParallelConfig) -> tuple[list[tuple[int, int]], tuple[int, int], tuple[int, int]]:
    """Returns FLOPs and parameters of each layer, of what precedes the layers, and of what follows them."""
    flops, after = flops_by_layer(config, COST_LENGTH)
    sizes = {name: math.prod(shape) for name, shape in shapes(config).items()}
    layers = [sum(size for name, size in sizes.items() if name.startswith(f"layers.{index}.")) for index in range(config.layers)]
    embedding = sizes["embedding.weight"]
    rest = sum(sizes.values()) - sum(layers) - embedding
    copy = embedding if copies_embedding(config, parallel) else 0
    return list(zip(flops, layers, strict=True)), (0, embedding), (after, rest + copy)


def _cheapest(layers: list[tuple[int, int]], before: tuple[int, int], after: tuple[int, int], stages: int) -> list[int]:
    """Returns the layers of each stage such that the most FLOPs of a stage are fewest, and then the most parameters.

    Each stage but the last has a layer at least. If several cuts are equal, the first stages have more.
    """
    sums = [(0, 0), *itertools.accumulate(layers, lambda one, other: (one[0] + other[0], one[1] + other[1]))]

    def cost(stage: int, start: int, end: int) -> tuple[int, int]:
        flops, parameters = sums[end][0] - sums[start][0], sums[end][1] - sums[start][1]
        if stage == 0:
            flops, parameters = flops + before[0], parameters + before[1]
        if stage == stages - 1:
            flops, parameters = flops + after[0], parameters + after[1]
        return flops, parameters

    def best(limit: float) -> tuple[float, list[int]]:
        """The least possible maximum of what is minimised, FLOPs (no limit) or parameters (FLOPs at most `limit`), and the cut."""

        @cache
        def rest(stage: int, start: int) -> tuple[float, list[int]]:
            if stage == stages - 1:
                return of(cost(stage, start, len(layers))), [len(layers) - start]
            found: tuple[float, list[int]] = (math.inf, [])
            for end in range(len(layers) - (stages - 2 - stage), start, -1):
                mine = of(cost(stage, start, end))
                if mine < found[0]:
                    most, sizes = rest(stage + 1, end)
                    if (most := max(most, mine)) < found[0]:
                        found = most, [end - start, *sizes]
            return found

        def of(pair: tuple[int, int]) -> float:
            return pair[0] if limit == math.inf else pair[1] if pair[0] <= limit else math.inf

        return rest(0, 0)

    return best(best(math.inf)[0])[1]
