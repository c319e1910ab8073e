"""The tensors that a resumed run needs, by global name: weights, moments, random states; and which of them are not finite."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import _foreach_norm  # pyright: ignore[reportPrivateImportUsage]

from ..moe.init import expert_biases
from ..parallel.apply import Parallel, gradient_of, local
from ..parallel.collectives import sum_over
from ..parallel.object_collectives import from_all
from ..parallel.shard import LocalShard, whole
from .lean_adamw import LeanAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The names of AdamW's moments; of a parameter that Muon updates, the first is its momentum and there is no other."""


def local_state(parallel: Parallel, optimizer: torch.optim.Optimizer) -> dict[str, LocalShard]:
    """Returns this rank's tensors by global name: `model.NAME`, `optimizer.NAME.exp_avg` and, of AdamW, `.exp_avg_sq`, with scales
    if they are 8-bit.

    They are the tensors in use: loading into them restores weights and moments.
    """
    if isinstance(optimizer, LeanAdamW):
        return local_weights(parallel) | optimizer.shards()
    states = {name: optimizer_state(optimizer, sharded.parameter) for name, sharded in parallel.parameters.items()}
    return local_weights(parallel) | {
        f"optimizer.{name}.{moment}": LocalShard(parallel.parameters[name].metadata, local(state[moment]))
        for name, state in states.items()
        for moment in MOMENTS
        if moment in state
    }


def local_weights(parallel: Parallel) -> dict[str, LocalShard]:
    """Returns parameters and expert biases, the tensors in use."""
    held = {f"model.{name}": LocalShard(p.metadata, local(p.parameter.detach())) for name, p in parallel.parameters.items()}
    for name, bias in expert_biases(parallel.model).items():
        held[f"model.{name}"] = LocalShard(whole(bias.shape), bias)
    return held


def optimizer_state(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, Any]:
    """Returns the state of one parameter; before the first step AdamW's is created here, as AdamW would."""
    if isinstance(optimizer, LeanAdamW):
        return optimizer.state_of(parameter)
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=local(parameter).device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state


def set_optimizer_steps(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: int) -> None:
    """Sets AdamW's step count, which it keeps for each parameter; Muon needs none."""
    for parameter in parameters:
        state = optimizer_state(optimizer, parameter)
        if isinstance(optimizer, LeanAdamW):
            state["step"] = steps
        elif "step" in state:
            state["step"].fill_(steps)


def random_state() -> dict[str, LocalShard]:
    """Returns the states of all generators of this process (Python's, numpy's, torch's), under names of this rank.

    A second normal number that Python or numpy may have stored is dropped.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    version, python_words, _ = random.getstate()
    numpy_state: Any = np.random.get_state()
    states = {
        "cpu": torch.get_rng_state(),
        "python": torch.tensor([version, *python_words]),
        "numpy": torch.tensor([*numpy_state[1].tolist(), numpy_state[2]]),  # words and position
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"random.{kind}.rank_{rank}": LocalShard(whole(state.shape), state) for kind, state in states.items()}


def restore_random(held: dict[str, LocalShard]) -> None:
    """Sets the generators to the states in `held`."""
    for name, (_, state) in held.items():
        match name.split(".")[1]:
            case "cpu":
                torch.set_rng_state(state)
            case "cuda":
                torch.cuda.set_rng_state(state)
            case "python":
                version, *words = state.long().tolist()
                random.setstate((version, tuple(words), None))
            case "numpy":
                words = state.numpy()
                np.random.set_state(("MT19937", words[:-1].astype(np.uint32), int(words[-1]), 0, 0.0))


# Names tensors that are not finite: gradients after a step with a fault, weights and moments before a checkpoint.

SHOWN = 4
"""The most names that a rank reports."""


def bad_gradients(parallel: Parallel) -> list[str]:
    """Returns `rank R: parameter` for the first gradients of each rank that are not finite. Collective."""
    mine = [name for name, sharded in parallel.parameters.items() if not gradient_of(sharded).isfinite().all()]
    return _of_all_ranks(mine)


def bad_state(parallel: Parallel, held: dict[str, LocalShard]) -> list[str]:
    """Returns the same for weights and moments. Collective; if all are finite, only one number a rank is exchanged.

    Neither a sum nor a norm can hide a NaN or infinite element, so each tensor is read once. A sum of finite numbers may overflow:
    the search by name then finds nothing. On a GPU the norms of all tensors are one kernel; on a CPU a norm takes seven times as
    long as a sum.
    """
    floating = {name: tensor for name, (_, tensor) in held.items() if tensor.is_floating_point() and tensor.numel()}
    tensors, found = list(floating.values()), torch.zeros((), device=parallel.device)
    if tensors:
        sums = [tensor.sum() for tensor in tensors] if parallel.device.type == "cpu" else _foreach_norm(tensors, float("inf"))
        found = (~torch.stack([each.double() for each in sums]).isfinite()).any().float()
    if not sum_over(found, parallel.mesh.everyone).item():
        return []
    return _of_all_ranks([name for name, tensor in floating.items() if not tensor.isfinite().all()])


def _of_all_ranks(mine: list[str]) -> list[str]:
    return [f"rank {rank}: {name}" for rank, names in enumerate(from_all(mine[:SHOWN])) for name in names]
