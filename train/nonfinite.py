"""Names tensors that are not finite: gradients after a step with a fault, weights and moments before a checkpoint."""

import torch
from torch import _foreach_norm  # pyright: ignore[reportPrivateImportUsage]

from ..parallel.apply import Parallel
from ..parallel.collectives import sum_over
from ..parallel.gradients import gradient_of
from ..parallel.object_collectives import from_all
from ..parallel.shard import LocalShard

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
