"""AdamW over this rank's shards."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..parallel.apply import Parallel, ShardedParameter
from .config.config import OptimizerConfig, OptimizerStates
from .lean_adamw import LeanAdamW


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
    listed = [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, **dict(marks)}
        for (decays, _, marks), parameters in groups.items()
    ]
    if config.offload or config.states is not OptimizerStates.fp32:
        return LeanAdamW(listed, parallel.parameters, config)
    return torch.optim.AdamW(
        listed,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
