"""What is not finite, by name: looked for only after the ranks agreed that something is, and before a checkpoint is written."""

import torch
from torch import Tensor, _foreach_norm  # pyright: ignore[reportPrivateImportUsage]

from ..parallel.apply import Parallel
from ..parallel.collectives import sum_over
from ..parallel.gradients import gradient_of
from ..parallel.object_collectives import from_all
from ..parallel.shard import LocalShard

SHOWN = 4


def bad_gradients(parallel: Parallel) -> list[str]:
    """`rank R: parameter` for gradients that are not finite, the first of each rank. Collective."""
    mine = [name for name, sharded in parallel.parameters.items() if not gradient_of(sharded).isfinite().all()]
    return _of_all_ranks(mine)


def bad_state(parallel: Parallel, held: dict[str, LocalShard]) -> list[str]:
    """The same for weights and moments. Collective; without a bad one anywhere it is one number a rank."""
    floating = {name: tensor for name, (_, tensor) in held.items() if tensor.is_floating_point() and tensor.numel()}
    found = _any_bad(list(floating.values()), parallel.device)
    if not sum_over(found, parallel.mesh.everyone).item():
        return []
    return _of_all_ranks([name for name, tensor in floating.items() if not tensor.isfinite().all()])


def _any_bad(tensors: list[Tensor], device: torch.device) -> Tensor:
    """1 if one of them has a NaN or infinite element, which neither a sum nor a norm can hide: one read each.

    A sum of finite numbers may overflow; what a 1 means is then looked for by name, and not found.
    """
    if not tensors:
        return torch.zeros((), device=device)
    # The norms of all are one kernel on a GPU; on a CPU each takes seven times as long as a sum.
    sums = [tensor.sum() for tensor in tensors] if device.type == "cpu" else _foreach_norm(tensors, float("inf"))
    return (~torch.stack([each.double() for each in sums]).isfinite()).any().float()


def _of_all_ranks(mine: list[str]) -> list[str]:
    return [f"rank {rank}: {name}" for rank, names in enumerate(from_all(mine[:SHOWN])) for name in names]
