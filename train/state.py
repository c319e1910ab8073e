"""Everything a resumed run needs, as named pieces of tensors and plain facts."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..moe.init import expert_biases
from ..parallel.apply import Parallel, local
from ..parallel.shard import LocalShard, whole

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW."""


def held_state(parallel: Parallel, optimizer: torch.optim.Optimizer) -> dict[str, LocalShard]:
    """This rank's tensors by global name: `model.NAME`, `optimizer.NAME.exp_avg` and `.exp_avg_sq`.

    The tensors are the live ones: loading into them restores weights and moments.
    """
    held = held_weights(parallel)
    for name, sharded in parallel.parameters.items():
        moments = optimizer_state(optimizer, sharded.parameter)
        for moment in MOMENTS:
            held[f"optimizer.{name}.{moment}"] = LocalShard(sharded.metadata, local(moments[moment]))
    return held


def held_weights(parallel: Parallel) -> dict[str, LocalShard]:
    """Parameters and expert biases, the live tensors."""
    held = {f"model.{name}": LocalShard(p.metadata, local(p.parameter.detach())) for name, p in parallel.parameters.items()}
    for name, bias in expert_biases(parallel.model).items():
        held[f"model.{name}"] = LocalShard(whole(bias.shape), bias)
    return held


def optimizer_state(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, Any]:
    """AdamW's state of one parameter; made here, as AdamW would, if there was no step yet."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=local(parameter).device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state


def set_optimizer_steps(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: int) -> None:
    """AdamW counts its steps for each parameter; here they are all those of the run."""
    for parameter in parameters:
        optimizer_state(optimizer, parameter)["step"].fill_(steps)


def random_state() -> dict[str, LocalShard]:
    """The states of all generators of this process (Python's, numpy's, torch's), under names that hold for this rank alone."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    states = {"cpu": torch.get_rng_state(), "python": _python_state(), "numpy": _numpy_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"random.{kind}.rank_{rank}": LocalShard(whole(state.shape), state) for kind, state in states.items()}


def restore_random(held: dict[str, LocalShard]) -> None:
    """Set the generators to the states in `held`."""
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


def _python_state() -> torch.Tensor:
    """Version, words and position of `random`; a normal number that it may have in store is not kept."""
    version, words, _ = random.getstate()
    return torch.tensor([version, *words])


def _numpy_state() -> torch.Tensor:
    """Words and position of numpy's global generator; as above."""
    state = np.random.get_state()
    return torch.tensor([*state[1].tolist(), state[2]])  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue, reportArgumentType]
