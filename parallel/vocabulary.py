"""The vocabulary split over tensor-parallel ranks (Megatron-LM): embedding, and cross entropy over sliced logits.

T tokens, V columns of the vocabulary on this rank; the axis may have one rank, and then this is the ordinary cross entropy.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .collectives import max_over, scatter_sequence, sum_over
from .mesh import Axis

CHUNK = {"cpu": 2**18, "cuda": 2**26}
"""Logits that are widened at once, so that the fp32 copy of all logits never exists: on a CPU what fits its cache."""


class VocabularyParallelEmbedding(nn.Module):
    """Holds the embedding's rows from `first` on; gives this rank's slice (B, S / N, D) of each sequence."""

    def __init__(self, weight: nn.Parameter, first: int, axis: Axis) -> None:
        super().__init__()
        self.weight = weight
        self.first = first
        self.axis = axis

    def forward(self, ids_BS: Tensor) -> Tensor:
        local_BS = ids_BS - self.first
        absent_BS = (local_BS < 0) | (local_BS >= len(self.weight))
        part_BSD = F.embedding(local_BS.masked_fill(absent_BS, 0), self.weight)
        return scatter_sequence(part_BSD.masked_fill(absent_BS[..., None], 0), self.axis)


def cross_entropy_sum(logits_TV: Tensor, targets_T: Tensor, ignore: int, axis: Axis) -> Tensor:
    """Sum over tokens of -log softmax(logits)[target], in nats, in fp32 or wider; targets equal to `ignore` are left out.

    Every rank of the axis gets the whole sum, and the gradient of its own columns.
    """
    return _CrossEntropySum.apply(logits_TV, targets_T, ignore, axis)  # pyright: ignore[reportReturnType]


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, ignore: int, axis: Axis) -> Tensor:
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        local_T, here_T = _local_targets(targets_T, logits_TV.shape[1], axis)
        parts_2T = torch.empty(2, len(targets_T), dtype=wide, device=logits_TV.device)
        for part in _chunks(logits_TV):
            parts_2T[0, part] = logits_TV[part].to(wide).logsumexp(dim=1)
            parts_2T[1, part] = logits_TV[part].gather(1, local_T[part, None]).squeeze(1).to(wide) * here_T[part]
        largest_T = max_over(parts_2T[0].clone(), axis)
        parts_2T[0] = (parts_2T[0] - largest_T).exp_()
        exps_T, target_logits_T = sum_over(parts_2T, axis)
        logsumexp_T = exps_T.log() + largest_T
        ctx.save_for_backward(logits_TV, targets_T, logsumexp_T)
        ctx.ignore, ctx.axis = ignore, axis
        return ((logsumexp_T - target_logits_T) * (targets_T != ignore)).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        logits_TV, targets_T, logsumexp_T = ctx.saved_tensors
        local_T, here_T = _local_targets(targets_T, logits_TV.shape[1], ctx.axis)
        factor_T = grads[0] * (targets_T != ctx.ignore)
        grad_TV = torch.empty_like(logits_TV)
        for part in _chunks(logits_TV):
            grad = (logits_TV[part].to(logsumexp_T.dtype) - logsumexp_T[part, None]).exp_()
            grad.scatter_add_(1, local_T[part, None], -here_T[part, None].to(grad.dtype))
            grad_TV[part] = grad.mul_(factor_T[part, None])
        return grad_TV, None, None, None


def _local_targets(targets_T: Tensor, columns: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """Each target's column on this rank (0 if it is elsewhere), and whether it is here."""
    local_T = targets_T - axis.rank * columns
    here_T = (local_T >= 0) & (local_T < columns)
    return local_T.masked_fill(~here_T, 0), here_T


def _chunks(logits_TV: Tensor) -> list[slice]:
    tokens = max(1, CHUNK[logits_TV.device.type] // logits_TV.shape[1])
    return [slice(start, start + tokens) for start in range(0, len(logits_TV), tokens)]
