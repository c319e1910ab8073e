"""Random pairs of a preset and a layout, and the memory of a rank of each: in closed form, and by the dry run.

`python tests/plan/memory_pairs.py 200` compares as many, `memory_pairs.py 100 200` those from seed 100 on; the tests take a few
that are quick.
"""

import copy
import random
import sys
from typing import NamedTuple

from tokenyard.parallel.config import OWN_EXCHANGES, ContextExchange, Exchange, PipelineSchedule
from tokenyard.plan.rank_memory import rank_memory
from tokenyard.plan.workload import RECOMPUTED
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config
from tokenyard.train.config.rules.rules import violations

PRESETS = [
    *("deepseek_moe_16b", "deepseek_v2_lite", "deepseek_v3", "dense", "dots_llm1", "ernie_4_5_21b_a3b", "glm_4_5_air"),
    *("glm_4_7_flash", "gpt_oss_20b", "gpt_oss_120b", "granite_3_0_3b_a800m", "grok_1", "kimi_k2", "minimax_m2", "mixtral_8x22b"),
    *("mixtral_8x7b", "olmoe_1b_7b", "qwen2_57b_a14b", "qwen3_235b_a22b", "qwen3_30b_a3b", "solar_open_100b"),
]


class Pair(NamedTuple):
    """A configuration of a run, and a rank of it."""

    words: str
    config: Config
    world: int
    rank: int


def draw(seed: int) -> Pair:
    """Returns a legal pair, of few layers: memory grows with them in equal steps."""
    r = random.Random(seed)
    while True:
        preset, world, stages = r.choice(PRESETS), r.choice([8, 16, 32, 64, 128, 256]), r.choice([1, 1, 1, 2, 4])
        config = copy.deepcopy(compose([f"model={preset}", "precision=bf16", "launch=torchrun", "launch.ranks=8"]))
        p, micro = config.parallel, r.choice([1, 1, 2, 4])
        config.sequence_length = r.choice([2048, 4096, 8192])
        config.model.layers = r.choice([3, 4, 5]) if stages == 1 else r.choice([2, 3]) * stages + r.choice([0, 1])
        config.launch.nodes = world // 8
        p.pipeline, p.tensor, p.context = stages, r.choice([1, 1, 1, 2, 4]), r.choice([1, 1, 1, 1, 2])
        p.expert, p.expert_tensor = r.choice([1, 2, 4, 8, 8, 16, 32]), r.choice([1, 1, 1, 1, 2])
        p.shard, p.zero = r.choice([1, 2, 4, 8, 8, 16, 32, 64]), r.choice([3, 3, 3, 2, 1])
        p.recompute, p.exchange = r.choice(list(RECOMPUTED)), r.choice([Exchange.plain, *OWN_EXCHANGES])
        p.context_exchange = r.choice(list(ContextExchange))
        if stages > 1:
            p.pipeline_schedule = r.choice(list(PipelineSchedule))
        data = world // (p.tensor * p.context * stages)
        config.batch.micro, config.batch.sequences = (
            micro,
            micro * data * r.choice([1, 1, 2, 4] if stages == 1 else [stages, 2 * stages]),
        )
        if data and next(violations(config, world), None) is None:
            words = f"{preset} layers {config.model.layers} length {config.sequence_length} batch {config.batch} {p}"
            return Pair(words, config, world, r.randrange(world) if stages > 1 else 0)


def closed(pair: Pair) -> int:
    """Bytes of the rank in closed form."""
    return rank_memory(pair.config, pair.world, pair.rank * pair.config.parallel.pipeline // pair.world).peak


def measured(seed: int) -> float:
    """Bytes of the rank by its dry run, of the pair of this seed."""
    from tokenyard.plan.dry_run import step_facts

    pair = draw(seed)
    return step_facts(pair.config, pair.rank, pair.world).peak_bytes


if __name__ == "__main__":
    for seed in range(*map(int, sys.argv[1:])):
        pair = draw(seed)
        print(f"{seed} {closed(pair) / measured(seed) - 1:+.2%} {pair.words}", flush=True)
