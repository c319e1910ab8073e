"""AdamW over this rank's shards, and the learning rate schedule."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..parallel.apply import Parallel, ShardedParameter
from .config.config import OptimizerConfig, ScheduleConfig, Shape


def build_optimizer(
    config: OptimizerConfig, parallel: Parallel, mark: Callable[[ShardedParameter], dict[str, Any]] = lambda _: {}
) -> torch.optim.Optimizer:
    """Returns AdamW (Loshchilov and Hutter 2019). Every parameter is in exactly one group, which has the items of its `mark`.

    Matrices decay, norms do not (GPT-2). Torch updates the parameters of a group together, which excludes mixing plain tensors and
    different FSDP meshes.
    """
    groups: dict[Any, list[torch.nn.Parameter]] = defaultdict(list)
    for sharded in parallel.parameters.values():
        decays, parameter = len(sharded.metadata.shape) >= 2, sharded.parameter
        mesh = str(parameter.device_mesh) if isinstance(parameter, DTensor) else "plain"
        groups[decays, mesh, tuple(mark(sharded).items())].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, **dict(marks)}
            for (decays, _, marks), parameters in groups.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def learning_rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Returns the share of the peak learning rate in optimizer step `step` (the first is 1) of `steps`.

    After a linear warm-up the rate follows a cosine to `final` (Loshchilov and Hutter 2017), or is stable and then decays linearly
    to `final` (MiniCPM's warm-up-stable-decay), or falls in two equal steps, after 80 % and 90 % of the run (DeepSeekMoE, section
    5.1), or is constant.
    """
    if step <= config.warmup:
        return step / config.warmup
    if config.shape is Shape.constant:
        return 1.0
    if config.shape is Shape.multistep:
        return 1.0 if step <= 0.8 * steps else config.final**0.5 if step <= 0.9 * steps else config.final
    if config.shape is Shape.wsd:
        decay = config.decay if config.decay is not None else max(1, steps // 5)
        done = max(0.0, (step - (steps - decay)) / max(1, decay))
        return 1.0 - (1.0 - config.final) * done
    done = (step - config.warmup) / max(1, steps - config.warmup)
    return config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * done))
