"""What is not finite, by name: looked for only after the ranks agreed that something is, and before a checkpoint is written."""

import torch
from torch import Tensor, _foreach_norm  # pyright: ignore[reportPrivateImportUsage]

from ..parallel.apply import Parallel
from ..parallel.collectives import sum_over
from ..parallel.gradients import gradient_of
from ..parallel.pieces import Held
from .checkpoint.agree import from_all

SHOWN = 4


def bad_gradients(parallel: Parallel) -> list[str]:
    """`rank R: parameter` for gradients that are not finite, the first of each rank. Collective."""
    mine = [name for name, placed in parallel.placed.items() if not gradient_of(placed).isfinite().all()]
    return _of_all_ranks(mine)


def bad_state(parallel: Parallel, held: dict[str, Held]) -> list[str]:
    """The same for weights and moments. Collective; without a bad one anywhere it is one number a rank."""
    floating = {name: tensor for name, (_, tensor) in held.items() if tensor.is_floating_point() and tensor.numel()}
    found = _any_bad(list(floating.values()), parallel.device)
    if not sum_over(found, parallel.mesh.everyone).item():
        return []
    return _of_all_ranks([name for name, tensor in floating.items() if not tensor.isfinite().all()])


def _any_bad(tensors: list[Tensor], device: torch.device) -> Tensor:
    """1 if one of them has a NaN or infinite element: their sums of absolute values cannot hide one, and are one read each."""
    if not tensors:
        return torch.zeros((), device=device)
    sums = torch.stack([norm.double() for norm in _foreach_norm(tensors, float("inf"))])
    return (~sums.isfinite()).any().float()


def _of_all_ranks(mine: list[str]) -> list[str]:
    return [f"rank {rank}: {name}" for rank, names in enumerate(from_all(mine[:SHOWN])) for name in names]
