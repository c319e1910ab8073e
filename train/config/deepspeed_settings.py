"""The settings of DeepSpeed, derived from the configuration, and the rules of engine.*. Imports no torch."""

import copy
from collections.abc import Iterator
from typing import Any

from .config import Config, EngineKind, GradientDtype, OptimizerStates, Precision
from .matrices import OptimizerName
from .rules.rule import Violation
from .schema import nearest_text

ALLOWED_EXTRA: dict[str, type] = {
    "comms_logger.enabled": bool,
    "comms_logger.verbose": bool,
    "memory_breakdown": bool,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "zero_optimization.allgather_bucket_size": int,
    "zero_optimization.overlap_comm": bool,
    "zero_optimization.reduce_bucket_size": int,
    "zero_optimization.use_multi_rank_bucket_allreduce": bool,
}
"""What engine.extra may set, with the type: how DeepSpeed works and what it reports, never what it computes."""

DECIDED_BY = {
    "train_batch_size": "batch.sequences",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch.sequences and batch.micro",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "zero_optimization.stage": "engine.zero",
    "fp16": "precision",
    "bf16": "precision",
    "data_types": "precision",
    "torch_autocast": "precision",
    "communication_data_type": "precision",
    "tensor_parallel": "parallel.tensor",
    "expert_parallel": "parallel.expert",
    "activation_checkpointing": "parallel.recompute",
    "checkpoint": "checkpoint",
    "tensorboard": "tracker",
    "wandb": "tracker",
    "gradient_allreduce_op": "the rule of gradients, which are summed",
    "gradient_predivide_factor": "the rule of gradients, which are summed",
    "prescale_gradients": "the rule of gradients, which are summed",
}
"""What engine.extra may not set, with the setting that decides it."""

BUCKET_ELEMENTS = 2**23
"""Elements of one reduction. DeepSpeed's default of 2**29 allocates as many, whatever the size of the model."""


def deepspeed_settings(config: Config, world: int) -> dict[str, Any]:
    """Returns the contents of a DeepSpeed JSON file.

    gradient_accumulation_steps is 1, since DeepSpeed would divide by it: the engine marks the last micro-batch instead. Clipping
    and DeepSpeed's norm are off: our norm counts each expert once, and gradients are clipped by it before DeepSpeed's step. fp16
    and bf16 are off: they are about weights, which stay fp32 whatever the precision of the activations.
    """
    zero: dict[str, Any] = {"stage": config.engine.zero}
    if config.engine.zero:
        zero |= {"compute_grad_norm": False, "reduce_bucket_size": BUCKET_ELEMENTS, "allgather_bucket_size": BUCKET_ELEMENTS}
    settings = {
        "train_micro_batch_size_per_gpu": config.batch.micro or config.batch.sequences * config.parallel.tensor // world,
        "gradient_accumulation_steps": 1,
        "gradient_allreduce_op": "sum",
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    return _merged(settings, config.engine.extra)


def engine(config: Config, world: int) -> Iterator[Violation]:
    """Checks the settings engine.*."""
    c = config.engine
    if c.kind is EngineKind.torch:
        if c.zero:
            yield Violation("engine.zero", "must be 0 with engine=torch, which shards by parallel.shard", [0])
        if c.extra:
            yield Violation("engine.extra", "must be {} with engine=torch", [{}])
        return
    if c.zero == 3:
        rule = "must be 0, 1 or 2: DeepSpeed has no ZeRO-3 with experts; engine=torch with parallel.shard shards weights"
        yield Violation("engine.zero", rule, [0, 1, 2])
    if config.parallel.shard > 1:
        yield Violation("parallel.shard", "must be 1 with engine=deepspeed, which shards by engine.zero and not by FSDP", [1])
    if config.parallel.pipeline > 1:
        rule = "must be 1 with engine=deepspeed, whose step is not cut into stages; engine=torch has pipelines"
        yield Violation("parallel.pipeline", rule, [1])
    if config.optimizer.name is OptimizerName.muon:
        rule = "must be adamw with engine=deepspeed, which flattens parameters and so has no matrices; engine=torch has Muon"
        yield Violation("optimizer.name", rule, [OptimizerName.adamw])
    if config.optimizer.qk_clip is not None:
        rule = "must be null with engine=deepspeed, which keeps the weights that it updates to itself"
        yield Violation("optimizer.qk_clip", rule, [None])
    if config.precision is Precision.fp64:
        rule = "must be fp32 or bf16 with engine=deepspeed, which cannot sum gradients in fp64"
        yield Violation("precision", rule, [Precision.fp32])
    if config.optimizer.states is not OptimizerStates.fp32:
        rule = "must be fp32 with engine=deepspeed, which flattens moments with the weights"
        yield Violation("optimizer.states", rule, [OptimizerStates.fp32])
    if config.optimizer.gradients is not GradientDtype.fp32:
        yield Violation("optimizer.gradients", "must be fp32 with engine=deepspeed; engine=torch has it", [GradientDtype.fp32])
    if config.optimizer.offload:
        yield Violation("optimizer.offload", "must be false with engine=deepspeed; engine=torch has it", [False])
    for path, value in _leaves(c.extra):
        complaint = _complaint(".".join(path), value)
        if complaint:
            yield Violation("engine.extra", complaint, [_without(c.extra, path)])


def _complaint(key: str, value: Any) -> str:
    """Returns why engine.extra may not hold this key and value; empty if it may."""
    if key in ALLOWED_EXTRA:
        return (
            ""
            if type(value) is ALLOWED_EXTRA[key]
            else f"{key} must be {'true or false' if ALLOWED_EXTRA[key] is bool else 'an integer'}"
        )
    owner = next((owner for own, owner in DECIDED_BY.items() if key == own or key.startswith(f"{own}.")), None)
    if owner is not None:
        return f"{key} is decided by {owner}"
    return f"{key} is none of the settings that it may hold, did you mean {nearest_text(key, ALLOWED_EXTRA)}"


def _leaves(extra: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields each value with its path of keys; an empty mapping is a value."""
    for key, value in extra.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*above, str(key)))
        else:
            yield (*above, str(key)), value


def _without(extra: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Returns a copy without the value at `path`, and without mappings that are then empty."""
    left = {key: copy.deepcopy(value) for key, value in extra.items() if str(key) != path[0]}
    inner = _without(extra[path[0]], path[1:]) if path[1:] else {}
    return {**left, path[0]: inner} if inner else left


def _merged(settings: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Merges both deeply; `engine` has refused contradictions."""
    both = dict(settings)
    for key, value in extra.items():
        both[key] = _merged(settings.get(key, {}), value) if isinstance(value, dict) else value
    return both
