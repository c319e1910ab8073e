"""What Muon costs a rank of Kimi K2: FLOPs of its matrices, and bytes. `python -m tokenyard.bench.scale.muon_costs 2048`

The layout is 16 stages, with experts and FSDP over the ranks of each. Owners are computed as in a run, for some ranks of a stage.
"""

import math
import time
from typing import NamedTuple

from ...moe.param_count import training_flops_per_token
from ...moe.param_shapes import shapes
from ...parallel.layout import mesh_sizes, shard_of, stays_whole
from ...parallel.pipeline.stages import cut_layers, held_on
from ...train.config.compose import compose
from ...train.config.config import Config
from ...train.config.matrices import by_muon, matrices, newton_schulz_flops
from ...train.matrix_owners import Bucket, Layout, Sharding, buckets
from . import print_figures

STAGES, STAGE = 16, 1
BATCH = 67e6
"""Tokens of a step of Kimi K2 (arXiv:2507.20534, section 2.5)."""
BYTES = 2
"""Of an element that travels: products are in bf16."""


class Traffic(NamedTuple):
    """Elements of one bucket."""

    to_owners: int
    from_owners: int
    received: int
    taken: int


def figures(world: int) -> dict[str, float]:
    """Returns counts of the second stage, whose layers all have experts, and the seconds of a rank to find its part."""
    ranks = world // STAGES
    config = compose(
        [
            *("model=kimi_k2", "optimizer=muon", f"parallel.pipeline={STAGES}", f"parallel.expert={ranks}"),
            *(f"parallel.shard={ranks}", "launch=torchrun", f"launch.ranks={world}", f"batch.sequences={world}"),
        ]
    )
    begin = time.perf_counter()
    first = plan_of(config, world, STAGE, 0)
    seconds = time.perf_counter() - begin
    plans = [first, *(plan_of(config, world, STAGE, rank) for rank in sorted({ranks // 2, ranks - 1} - {0}))]
    own = [sum(newton_schulz_flops(shape) for bucket in plan for shape in bucket.shapes) for plan in plans]
    sent = [sum(BYTES * (each.to_owners + each.from_owners) for each in map(traffic, plan)) for plan in plans]
    step = training_flops_per_token(config.model, 4096) * BATCH / world
    held = sum(elements(config, world, rank=0).values())
    return {
        "TFLOP of products of a rank, most": max(own) / 1e12,
        "TFLOP of products of a rank, least": min(own) / 1e12,
        "share of a step of 67M tokens, %": 100 * max(own) / step,
        "GB that a rank sends, most": max(sent) / 1e9,
        "GB of its pieces, as they travel": BYTES * held / 1e9,
        "exchanges of a step": 2.0 * sum(bucket.travels for bucket in first),
        "GB of moments that AdamW has besides": 4 * held / 1e9,
        "seconds to find owners": seconds,
    }


def traffic(bucket: Bucket) -> Traffic:
    """Returns what a rank sends and receives for one bucket, in its two exchanges."""
    numbers = (
        sum(one.place.rows * one.place.columns for ones in lists.values() for one in ones)
        for lists in (bucket.sent, bucket.returned, bucket.received, bucket.taken)
    )
    return Traffic(*numbers)


def plan_of(config: Config, world: int, stage: int, rank: int) -> list[Bucket]:
    """Returns the buckets of a rank of a stage."""
    return buckets(Layout(config.model, config.optimizer.muon, mesh_sizes(config.parallel, world), rank), named(config, stage))


def named(config: Config, stage: int) -> dict[str, Sharding]:
    """Returns the parameters of a rank of the pipeline that Muon updates."""
    found, parallel = shapes(config.model), config.parallel
    if parallel.pipeline > 1:
        found = held_on(config.model, cut_layers(config.model, parallel), parallel, stage, found)
    fsdp, muon = parallel.shard > 1, config.optimizer.muon
    return {
        name: Sharding(shape, fsdp and not stays_whole(name, len(shape)))
        for name, shape in found.items()
        if by_muon(name, shape, muon)
    }


def elements(config: Config, world: int, rank: int) -> dict[str, int]:
    """Returns how many elements of these parameters a rank of the stage holds."""
    sizes = mesh_sizes(config.parallel, world)
    return {
        name: math.prod(shard_of(name, one.shape, config.model, sizes, one.by_fsdp, rank).sizes)
        for name, one in named(config, STAGE).items()
    }


def all_flops(config: Config, stage: int) -> int:
    """Returns the FLOPs of all matrices of a stage."""
    muon = config.optimizer.muon
    own = ((name, one.shape) for name, one in named(config, stage).items())
    return sum(newton_schulz_flops(matrix.shape) for name, shape in own for matrix in matrices(name, shape, config.model, muon))


def main() -> None:
    print_figures(figures)


if __name__ == "__main__":
    main()
