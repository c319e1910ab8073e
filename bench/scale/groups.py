"""Process groups of a rank, for DeepSeek-V3 as its authors cut it: how many it creates and keeps, and how long that takes.

Spreads the model over a rank in the middle of the pipeline, under torch's fake process group: all of the code runs, and no
connection is made. `python -m tokenyard.bench.scale.groups 2048` prints the numbers.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from ...parallel import apply
from ...parallel.communicators import communicators, grouping
from ...parallel.mesh import Mesh
from ...parallel.pipeline.p2p import Links
from ...plan import rank_step
from ...train.config.compose import compose
from ...train.config.config import Config

NODE = 8
"""GPUs of a node."""


class Clock:
    """Counts the calls of functions, and their seconds: a call inside of another one is part of it."""

    def __init__(self) -> None:
        self.calls, self.seconds, self.inside = 0, 0.0, False

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.inside:
                return function(*arguments, **options)
            self.inside, begin = True, perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.inside, self.seconds = False, self.seconds + perf_counter() - begin

        return call


def main() -> None:
    print(json.dumps(figures(int(sys.argv[1])), indent=1))


def layout(world: int) -> Config:
    """Returns the shipped experiment, or one like it: stages of 32 ranks or more, 16 at most, experts over up to 64 ranks."""
    stages = max(1, min(16, world // 32))
    stage = world // stages
    overrides = [f"parallel.pipeline={stages}", f"parallel.shard={stage}", f"parallel.expert={min(64, stage)}"]
    return compose(["experiment=deepseek_v3_2048_gpus", f"launch.nodes={world // NODE}", *overrides])


def figures(world: int) -> dict[str, float]:
    """Returns what a rank of the middle stage does for its groups when a run starts."""
    config = layout(world)
    creating, spreading, axes = Clock(), Clock(), Clock()
    places = [(dist, "new_group", creating), (rank_step, "parallelize", spreading)]
    places += [(Mesh, "ends", axes), (Links, "__init__", axes), (apply, "create_axes", axes)]
    with ExitStack() as undo:
        undo.enter_context(patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str(NODE)}))
        for owner, name, clock in places:
            undo.enter_context(patch.object(owner, name, clock.timed(getattr(owner, name))))
        with rank_step.dry_rank(config, world // 2, world):
            sizes = [len(dist.get_process_group_ranks(group)) for group in _groups()]
    found = communicators(config.model, config.parallel, world, NODE)
    return {
        "group creations of a rank": creating.calls,
        "groups of a rank, of several ranks": sum(size > 1 for size in sizes),
        "communicators of a rank for collectives, at most": len(found),
        "communicators of a rank for links to other stages alone, at most": grouping(
            config.model, config.parallel, world, NODE
        ).links,
        "connections of a rank with gloo": sum(size - 1 for size in sizes),
        "seconds for mesh and groups": axes.seconds,
        "seconds to spread the model": spreading.seconds,
    }


def _groups() -> list[Any]:
    from torch.distributed import distributed_c10d

    return list(distributed_c10d._world.pg_map)


if __name__ == "__main__":
    main()
