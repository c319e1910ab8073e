"""Sizes and costs of a model on a layout, for `tokenyard params`. Imports no torch, builds no model."""

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
)
from ...moe.param_count import training_flops_per_token as training_flops_per_token
from ...moe.param_shapes import shapes
from ...parallel.config import ParallelConfig
from ...parallel.layout import dense_ranks, fewest_ranks, rank_shapes
from .config import Config, ConfigError, Precision
from .rules.rules import violations
from .schema import written
from .state_bytes import gradient_bytes, moment_bytes
from .validate import nearest_valid

DEVICE_BYTES = 80e9
"""Memory of a device of 80 GB."""
SHARE = 0.9
"""The share of it for weights in inference; the rest is for activations and the cache."""
BITS = {"bf16": 16, "fp8": 8, "int4": 4}
"""Bits of a weight in inference; the scales of quantized types are not counted."""


def facts(config: Config, world: int) -> dict[str, Any]:
    """Returns all numbers, as printed with --json. Parameters are numbers of elements."""
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
        "bytes_per_rank": rank_bytes(config, world),
        "inference_bytes": {kind: parts.total * bits // 8 for kind, bits in BITS.items()},
        "devices_of_80_gb": {kind: math.ceil(parts.total * bits / 8 / (DEVICE_BYTES * SHARE)) for kind, bits in BITS.items()},
        "sequence_length": length,
        "flops_per_token": flops_per_token(model, length),
        "training_flops_per_token": training_flops_per_token(model, length, config.parallel.recompute.value),
        "kv_cache_bytes_per_token": 2 * kv_cache_elements(model, length) / length,
    }


def per_rank(config: Config, world: int) -> dict[str, int]:
    """Parameters that rank 0 of `world` holds between steps, by part, multi-token prediction included. No rank holds more."""
    parts = sum_by_part(rank_shapes(config.model, config.parallel, world))
    return {"total": sum(parts.values()), **parts}


def rank_bytes(config: Config, world: int) -> dict[str, int]:
    """Returns the bytes of weights, gradients and moments on the device of rank 0 of `world`, their total, and the moments on the
    host. Weights, and gradients unless `optimizer.gradients`, are fp32, fp64 with precision=fp64. Activations do not count.
    """
    held = rank_shapes(config.model, config.parallel, world)
    wide = 8 if config.precision is Precision.fp64 else 4
    moments = moment_bytes(held, shapes(config.model), config.optimizer, config.precision)
    weights, offload = wide * sum(map(math.prod, held.values())), config.optimizer.offload
    gradients = sum(
        math.prod(shape) * gradient_bytes(name, len(shape), config.optimizer, config.precision) for name, shape in held.items()
    )
    parts = {"weights": weights, "gradients": gradients, "optimizer": 0 if offload else moments}
    return {**parts, "total": sum(parts.values()), "host": moments if offload else 0}


def intended_ranks(config: Config, started: int) -> int:
    """Returns the ranks that were started or that launch.* would start; if that is one, the fewest that the degrees need."""
    asked = max(started, config.launch.nodes * config.launch.ranks)
    return asked if asked > 1 else fewest_ranks(config.parallel)


def layout_text(parallel: ParallelConfig, ranks: int) -> str:
    """Returns the degrees of a layout in words."""
    if ranks == 1:
        return "1 rank"
    replicate = ranks // parallel.pipeline // dense_ranks(parallel)
    text = f"{ranks} ranks: replicate {replicate} x shard {parallel.shard} x tensor {parallel.tensor}; expert {parallel.expert}"
    text += f" x expert_tensor {parallel.expert_tensor}" if parallel.expert_tensor > 1 else ""
    text += f"; context {parallel.context}" if parallel.context > 1 else ""
    return text + (f"; pipeline {parallel.pipeline}, {parallel.pipeline_schedule.value}" if parallel.pipeline > 1 else "")


def check_model_and_layout(config: Config, world: int, *further: str) -> None:
    """Raises ConfigError if model or layout violate a rule. Other settings (tokenizer, data) are not checked, but for `further`."""
    for violation in violations(config, world):
        if violation.key.partition(".")[0] in ("model", "parallel", "sequence_length", *further):
            value = written(attrgetter(violation.key)(config))
            raise ConfigError.of(violation.key, value, violation.rule, nearest_valid(config, world, violation))
