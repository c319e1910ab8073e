"""What `tokenyard params` tells about a model and a layout, as one object. No torch, nothing is built."""

import math
from operator import attrgetter
from typing import Any

from ...moe.param_count import Count as Count
from ...moe.param_count import count as count
from ...moe.param_count import (
    describe_routing,
    flops_per_token,
    kv_cache_elements,
    moe_layers,
    sum_by_part,
    training_flops_per_token,
)
from ...parallel.layout import fewest_ranks, rank_shapes
from .config import Config, ConfigError, Precision
from .rules.rules import broken_rules
from .schema import written
from .validate import nearest_valid

DEVICE_BYTES = 80e9
"""What a device of 80 GB holds."""
SHARE = 0.9
"""Of it for weights; the rest is for activations and the cache."""
BITS = {"bf16": 16, "fp8": 8, "int4": 4}
"""Of a weight in inference; scales of narrow types are not counted."""


def facts(config: Config, world: int) -> dict[str, Any]:
    """All numbers, as they are printed with --json. Parameters are numbers of elements, bytes and FLOPs plain numbers."""
    model, parts = config.model, count(config.model)
    held = per_rank(config, world)
    length = config.sequence_length
    return {
        "kind": "moe" if moe_layers(model) else "dense",
        "layers": model.layers,
        "moe_layers": moe_layers(model),
        "routing": describe_routing(model),
        "total": parts.total,
        "active": parts.active,
        "parts": vars(parts),
        "world": world,
        "per_rank": held,
        "bytes_per_rank": training_bytes(held["total"], config.precision),
        "inference_bytes": {kind: parts.total * bits // 8 for kind, bits in BITS.items()},
        "devices_of_80_gb": {kind: math.ceil(parts.total * bits / 8 / (DEVICE_BYTES * SHARE)) for kind, bits in BITS.items()},
        "sequence_length": length,
        "flops_per_token": flops_per_token(model, length),
        "training_flops_per_token": training_flops_per_token(model, length, config.parallel.recompute),
        "kv_cache_bytes_per_token": 2 * kv_cache_elements(model, length) / length,
    }


def per_rank(config: Config, world: int) -> dict[str, int]:
    """Parameters that rank 0 of `world` holds between steps (no rank holds more), by part; with multi-token prediction."""
    parts = sum_by_part(rank_shapes(config.model, config.parallel, world))
    return {"total": sum(parts.values()), **parts}


def training_bytes(parameters: int, precision: Precision) -> dict[str, int]:
    """Weights, gradients and AdamW's two moments, all in fp32 (with precision=fp64 in that); activations come on top."""
    each = 8 if precision is Precision.fp64 else 4
    parts = {"weights": parameters * each, "gradients": parameters * each, "optimizer": 2 * parameters * each}
    return {**parts, "total": sum(parts.values())}


def ranks_of(config: Config, started: int) -> int:
    """How many ranks are meant: those that are started or would be, else the fewest that the degrees need."""
    asked = max(started, config.launch.nodes * config.launch.ranks)
    return asked if asked > 1 else fewest_ranks(config.parallel)


def check(config: Config, world: int) -> None:
    """ConfigError if model or layout break a rule; what else the configuration says (tokenizer, batch) does not matter here."""
    for broken in broken_rules(config, world):
        if broken.key.partition(".")[0] in ("model", "parallel", "sequence_length"):
            value = written(attrgetter(broken.key)(config))
            raise ConfigError.of(broken.key, value, broken.rule, nearest_valid(config, world, broken))
