"""The vocabulary split over tensor-parallel ranks (Megatron-LM): embedding, and the head with its cross entropy.

T tokens, D width, V columns of the vocabulary on this rank. An axis of one rank gives the ordinary loss.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..moe.device import kind_of, uses_kernels
from ..moe.kernels import operators
from ..moe.linear import compute_dtype
from ..moe.model import LMHead
from .collectives import max_over, scatter_sequence, sum_over
from .mesh import Axis

LOGITS = {"cpu": 2**21, "cuda": 2**27}
"""Logits that exist at once: head and loss work on a chunk of tokens with that many logits, which the next chunk overwrites."""


class VocabularyParallelEmbedding(nn.Module):
    """Holds the rows of the embedding from `first` on; returns this rank's slice (B, S / N, D) of each sequence."""

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


def head_loss(
    x: Tensor, weight_VD: Tensor, head: LMHead, targets: Tensor, ignore: int, axis: Axis, scores_2T: Tensor | None = None
) -> Tensor:
    """Returns the sum over tokens of -log softmax(logits)[target], in nats, in fp32 or wider, without targets equal to `ignore`.

    x (..., D) are hidden states, the same on all ranks of the axis; weight_VD are this rank's columns of the vocabulary. Every rank
    gets the whole sum, the gradient of its own weight, and the part of the gradient of x that is due to its columns.
    `scores_2T`, if given, receives the terms of the sum, and 1 for each target that has the largest logit; elsewhere 0.
    """
    differentiates = torch.is_grad_enabled() and (x.requires_grad or weight_VD.requires_grad)
    arguments = x.flatten(0, -2), weight_VD, head, targets.flatten(), ignore, axis, differentiates, scores_2T
    return _HeadLoss.apply(*arguments)  # pyright: ignore[reportReturnType]


def head_logits(x_BD: Tensor, weight_VD: Tensor, head: LMHead) -> Tensor:
    """Returns the logits (B, V) of this rank's columns, in fp32 or wider."""
    cast_VD, dtype = weight_VD.to(x_BD.dtype), compute_dtype(x_BD)
    return head.to_logits(F.linear(x_BD.to(dtype), cast_VD.to(dtype))).to(torch.promote_types(x_BD.dtype, torch.float32))


class _HeadLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, while the logits of a chunk exist: none are saved, and none computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_VD: Tensor,
        head: LMHead,
        targets_T: Tensor,
        ignore: int,
        axis: Axis,
        differentiates: bool,
        scores_2T: Tensor | None,
    ) -> Tensor:
        dtype, product_dtype, wide = x_TD.dtype, compute_dtype(x_TD), torch.promote_types(x_TD.dtype, torch.float32)
        cast_VD, x_TD = weight_VD.to(dtype).to(product_dtype), x_TD.to(product_dtype)
        gradients = (torch.empty_like(x_TD), torch.zeros_like(weight_VD, dtype=wide)) if differentiates else None
        total = torch.zeros((), dtype=wide, device=x_TD.device)
        tokens = max(1, LOGITS[kind_of(x_TD)] // len(weight_VD))
        # The multiplier and the soft cap, whose backward pass needs the logits, come after the cross entropy in fp32.
        narrow = uses_kernels(x_TD) and head.softcap is None and head.multiplier == 1.0
        for start in range(0, len(x_TD), tokens):
            part = slice(start, start + tokens)
            logits_TV = head.to_logits(F.linear(x_TD[part], cast_VD))
            overwritten_TV = logits_TV if narrow else logits_TV.to(wide, copy=head.softcap is not None)
            scores = None if scores_2T is None else scores_2T[:, part]
            loss, gradient_TV = cross_entropy(overwritten_TV, targets_T[part], ignore, axis, scores)
            total += loss
            if gradients is not None:
                grad_x_TD, grad_weight_VD = gradients
                gradient_TV = head.to_logits_backward(gradient_TV, logits_TV).to(x_TD.dtype)
                torch.mm(gradient_TV, cast_VD, out=grad_x_TD[part])
                if wide == x_TD.dtype:
                    grad_weight_VD.addmm_(gradient_TV.T, x_TD[part])
                else:
                    grad_weight_VD += gradient_TV.T @ x_TD[part]
        ctx.gradients = None if gradients is None else (gradients[0].to(dtype), gradients[1])
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Scales the gradients in place and returns them, which works only once."""
        (grad_x_TD, grad_weight_VD), ctx.gradients = ctx.gradients, None
        return grad_x_TD.mul_(grads[0]), grad_weight_VD.mul_(grads[0]).to(ctx.weight_dtype), *6 * [None]


def cross_entropy(
    logits_TV: Tensor, targets_T: Tensor, ignore: int, axis: Axis, scores_2T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the sum over tokens, and its gradient (T, V), which overwrites the logits. `scores_2T`: see `head_loss`."""
    columns, counted_T = logits_TV.shape[1], targets_T != ignore
    local_T = targets_T - axis.rank * columns
    here_T = (local_T >= 0) & (local_T < columns) & counted_T
    if uses_kernels(logits_TV):
        return _cross_entropy_by_kernels(logits_TV, local_T.masked_fill(~here_T, -1), counted_T, axis, scores_2T)
    local_T = local_T.masked_fill(~here_T, 0)
    target_logits_T = logits_TV.gather(1, local_T[:, None]).squeeze(1) * here_T
    largest_T = max_over(logits_TV.amax(1), axis)
    exps_TV = logits_TV.sub_(largest_T[:, None]).exp_()
    exps_T, target_logits_T = sum_over(torch.stack([exps_TV.sum(1), target_logits_T]), axis)
    loss = _add_up((exps_T.log() + largest_T - target_logits_T) * counted_T, target_logits_T >= largest_T, counted_T, scores_2T)
    gradient_TV = exps_TV.mul_((counted_T / exps_T)[:, None])
    return loss, gradient_TV.scatter_add_(1, local_T[:, None], -here_T[:, None].to(exps_TV.dtype))


def _add_up(loss_T: Tensor, likeliest_T: Tensor, counted_T: Tensor, scores_2T: Tensor | None) -> Tensor:
    """Returns the sum of the losses, and stores what `scores_2T` is to receive."""
    if scores_2T is not None:
        scores_2T[0], scores_2T[1] = loss_T, likeliest_T & counted_T
    return loss_T.sum()


def _cross_entropy_by_kernels(
    logits_TV: Tensor, target_T: Tensor, counted_T: Tensor, axis: Axis, scores_2T: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `cross_entropy`: the logits may be narrow, and the gradient has their dtype. target_T: the column on this rank, or -1."""
    own_T, exps_T, target_logits_T = operators.reduce_logits(logits_TV, target_T)
    largest_T = max_over(own_T.clone(), axis)
    exps_T, target_logits_T = sum_over(torch.stack([exps_T * (own_T - largest_T).exp(), target_logits_T]), axis)
    loss = _add_up((exps_T.log() + largest_T - target_logits_T) * counted_T, target_logits_T >= largest_T, counted_T, scores_2T)
    operators.cross_entropy_gradient(logits_TV, target_T, largest_T, counted_T / exps_T)
    return loss, logits_TV
