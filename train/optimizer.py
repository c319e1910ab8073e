"""The optimizer over this rank's shards."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..parallel.apply import Parallel, ShardedParameter
from .config.config import GradientDtype, OptimizerConfig, OptimizerStates
from .config.matrices import OptimizerName, by_muon
from .lean_adamw import LeanAdamW
from .muon import Muon


def build_optimizer(
    config: OptimizerConfig, parallel: Parallel, mark: Callable[[ShardedParameter], dict[str, Any]] = lambda _: {}
) -> torch.optim.Optimizer:
    """Returns AdamW, whose groups have the items of the `mark` of their parameters, or Muon, whose groups have none. Collective."""
    if config.name is OptimizerName.adamw:
        return build_adamw(config, parallel.parameters, mark)
    named = {name: one for name, one in parallel.parameters.items() if by_muon(name, one.metadata.shape, config.muon)}
    rest = {name: sharded for name, sharded in parallel.parameters.items() if name not in named}
    return Muon(config, parallel, named, build_adamw(config, rest))


def build_adamw(
    config: OptimizerConfig,
    parameters: Mapping[str, ShardedParameter],
    mark: Callable[[ShardedParameter], dict[str, Any]] = lambda _: {},
) -> torch.optim.Optimizer:
    """Returns AdamW (Loshchilov and Hutter 2019). Every parameter is in exactly one group, which has the items of its `mark`.

    Matrices decay, norms do not (GPT-2). Torch updates the parameters of a group together, which excludes mixing plain tensors and
    different FSDP meshes.
    """
    groups: dict[Any, list[torch.nn.Parameter]] = defaultdict(list)
    for sharded in parameters.values():
        decays, parameter = len(sharded.metadata.shape) >= 2, sharded.parameter
        mesh = str(parameter.device_mesh) if isinstance(parameter, DTensor) else "plain"
        groups[decays, mesh, tuple(mark(sharded).items())].append(parameter)
    listed = [
        {"params": members, "weight_decay": config.weight_decay if decays else 0.0, **dict(marks)}
        for (decays, _, marks), members in groups.items()
    ]
    if config.offload or config.states is not OptimizerStates.fp32 or config.gradients is not GradientDtype.fp32:
        return LeanAdamW(listed, parameters, config)
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
