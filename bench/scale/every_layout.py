"""Process groups of a rank on any layout: of all layouts of a small DeepSeek-V3, or of some of them in large worlds.

`python -m tokenyard.bench.scale.every_layout 64` prints the numbers.
"""

import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...parallel.communicators import MOST, communicators, grouping
from ...parallel.config import Exchange, ParallelConfig, PipelineSchedule
from ...train.config.compose import compose

NODE = 8
KINDS: list[dict[str, Any]] = [
    {},
    {"pipeline_schedule": PipelineSchedule["interleaved"], "exchange": Exchange.hierarchical},
    {"exchange": Exchange.deepep},
]
"""The schedules and exchanges of the layouts."""


def main() -> None:
    print(json.dumps(figures(int(sys.argv[1])), indent=1))


def figures(world: int) -> dict[str, float]:
    """Returns how many groups a rank has, with those of links to other stages."""
    every = sum(1 for _ in layouts(world))
    model, counts, sharing = compose(["model=tiny_deepseek_v3"]).model, Counter[int](), Counter[str]()
    step = 1 if every < 10_000 else every // 1000 | 1  # odd, so that no degree is left out
    for degrees, kind in itertools.product(itertools.islice(layouts(world), 0, None, step), KINDS):
        parallel = replace(degrees, **kind)
        found = grouping(model, parallel, world, NODE)
        counts[len(communicators(model, parallel, world, NODE)) + found.links] += 1
        sharing["messages instead of groups"] += bool(found.by_messages)
        sharing["one group for all links"] += found.links_together
    tried = counts.total()
    return {
        "layouts": every,
        "layouts that were tried, with three exchanges": tried // len(KINDS),
        "groups of a rank, at most": max(counts),
        f"% of layouts with more than {MOST}": 100 * sum(counts[count] for count in counts if count > MOST) / tried,
        **{f"% of layouts with {name}": 100 * count / tried for name, count in sharing.items()},
    }


def layouts(world: int) -> Iterator[ParallelConfig]:
    """Yields every combination of degrees that fits."""
    for pipeline in divisors(world):
        stage = world // pipeline
        for tensor, context, shard in itertools.product(divisors(stage), repeat=3):
            if (shard > 1 and shard % context) or stage % (tensor * math.lcm(context, shard)):
                continue
            for expert in divisors(stage):
                for expert_tensor in divisors(stage // expert):
                    yield ParallelConfig(
                        tensor=tensor, context=context, shard=shard, expert=expert, expert_tensor=expert_tensor, pipeline=pipeline
                    )


def divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


if __name__ == "__main__":
    main()
