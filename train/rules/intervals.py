"""Where each number of the configuration must lie."""

import math
from collections.abc import Iterator
from operator import attrgetter

from .. import deepspeed_settings
from ..config import Config
from . import data_rules, exchange_rules, launch_rules, layout_rules, router_rules, survival_rules
from .broken import Broken

INTERVALS = {
    "steps": "[1, inf)",
    "seed": "[0, 9223372036854775808)",
    "sequence_length": "[1, 1073741824]",
    "batch.sequences": "[1, inf)",
    "batch.micro": "[1, inf)",
    "model.layers": "[1, 1024]",
    "model.width": "[1, 1048576]",
    "model.heads": "[1, 65536]",
    "model.kv_heads": "[1, 65536]",
    "model.head_width": "[1, 65536]",
    "model.hidden": "[1, 16777216]",
    "model.vocabulary": "[1, 16777216]",
    "model.dense_first": "[0, 1024]",
    "model.moe_every": "[1, inf)",
    "model.norm_epsilon": "(0, inf)",
    "model.embedding_multiplier": "(0, inf)",
    "model.output_multiplier": "(0, inf)",
    "model.output_softcap": "(0, inf)",
    "model.init_std": "(0, inf)",
    "model.mtp_depth": "[0, 64]",
    "model.mtp_coefficient": "[0, inf)",
    "model.attention.window": "[1, inf)",
    "model.attention.window_every": "[1, inf)",
    "model.attention.softcap": "(0, inf)",
    "model.attention.scale": "(0, inf)",
    "model.attention.rope.theta": "(1, inf)",
    "model.attention.rope.fraction": "(0, 1]",
    "model.attention.rope.factor": "[1, inf)",
    "model.attention.rope.original_length": "[1, inf)",
    "model.attention.rope.beta_fast": "(0, inf)",
    "model.attention.rope.beta_slow": "(0, inf)",
    "model.attention.rope.attention_factor": "(0, inf)",
    "model.attention.rope.mscale": "[0, inf)",
    "model.attention.rope.mscale_all": "[0, inf)",
    "model.attention.rope.low_frequency_factor": "(0, inf)",
    "model.attention.rope.high_frequency_factor": "(0, inf)",
    "model.attention.mla.q_rank": "[1, 1048576]",
    "model.attention.mla.kv_rank": "[1, 1048576]",
    "model.attention.mla.nope_width": "[1, 65536]",
    "model.attention.mla.rope_width": "[2, 65536]",
    "model.attention.mla.value_width": "[1, 65536]",
    "model.moe.experts": "[0, 65536]",
    "model.moe.top_k": "[1, inf)",
    "model.moe.hidden": "[1, 16777216]",
    "model.moe.shared_hidden": "[0, 16777216]",
    **router_rules.INTERVALS,
    **layout_rules.INTERVALS,
    **exchange_rules.INTERVALS,
    "model.moe.z_coefficient": "[0, inf)",
    "parallel.tensor": "[1, inf)",
    "parallel.shard": "[1, inf)",
    "parallel.expert": "[1, inf)",
    "parallel.timeout_seconds": "(0, inf)",
    "data.validation_fraction": "(0, 1)",
    **data_rules.INTERVALS,
    "data.synthetic_documents": "[2, inf)",
    "tokenizer.pieces": "[260, inf)",
    "tokenizer.sample_bytes": "[1, inf)",
    "optimizer.lr": "(0, inf)",
    "optimizer.beta1": "[0, 1)",
    "optimizer.beta2": "[0, 1)",
    "optimizer.epsilon": "(0, inf)",
    "optimizer.weight_decay": "[0, inf)",
    "optimizer.clip_norm": "(0, inf)",
    "schedule.warmup": "[0, inf)",
    "schedule.decay": "[1, inf)",
    "schedule.final": "[0, 1]",
    "evaluate.every": "[0, inf)",
    "evaluate.sequences": "[1, inf)",
    "checkpoint.every": "[0, inf)",
    "checkpoint.keep": "[1, inf)",
    "checkpoint.keep_every": "[0, inf)",
    "checkpoint.keep_best": "[0, inf)",
    "checkpoint.timeout_seconds": "(0, inf)",
    "log.every": "[1, inf)",
    "log.layers_every": "[0, inf)",
    "telemetry.every": "[1, inf)",
    "telemetry.probe": "[0, inf)",
    "telemetry.probe_every": "[0, inf)",
    "telemetry.window": "[1, inf)",
    "sample.tokens": "[0, inf)",
    "sample.temperature": "[0, inf)",
    "sample.top_p": "(0, 1]",
    **deepspeed_settings.INTERVALS,
    **launch_rules.INTERVALS,
    **survival_rules.INTERVALS,
}
"""Where each number must lie, unless it is null; ( and ) exclude the bound."""


def intervals(config: Config, world: int) -> Iterator[Broken]:
    for key, interval in INTERVALS.items():
        value = attrgetter(key)(config)
        if value is not None and not inside(value, interval):
            yield Broken(key, f"must be in {interval}", _around(key, interval))


def inside(value: float, interval: str) -> bool:
    """Whether `value` lies in an interval as INTERVALS has them."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    return (low <= value if interval[0] == "[" else low < value) and (value <= high if interval[-1] == "]" else value < high)


def _around(key: str, interval: str) -> list[object]:
    """Values inside: the bounds where they belong to it, the whole numbers above the lower one, and the default."""
    default = attrgetter(key)(Config())
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    if isinstance(default, float):
        return [value for value in (low, high, default) if inside(value, interval)]
    top = [] if math.isinf(high) else [value for value in (int(high), int(high) - 1) if inside(value, interval)]
    return [*range(int(low), int(low) + 64), *top, *([] if default is None else [default])]
