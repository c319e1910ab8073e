"""Expanding rows to different numbers of copies, and reducing the copies of each row again.

Both directions are gathers, as in moe/dispatch.py, and cost as much as there are copies, not as the most copies a row may have.
P rows, C choices (each is one copy of one row), R copies (padding included), D width, K the most choices of a row.
"""

import math
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...moe.dispatch import experts_or_dropped, plan_choices
from ...moe.router import Routing
from ..streams import on_device


class Expansion(NamedTuple):
    """Copy r is of row `row_R[r]`; choice c is copy `copy_C[c]`.

    Rows are sorted by their number of copies, most first: row p has place `place_P[p]`, and `copies[k]` are the k-th copies of the
    first rows in that order. `filled_R` is False for copies that are padding; None if there is none.
    """

    row_R: Tensor
    copy_C: Tensor
    place_P: Tensor
    copies: tuple[Tensor, ...]
    filled_R: Tensor | None = None


def plan_expansion(row_C: Tensor, nth_C: Tensor, copy_C: Tensor, rows: int, depths: list[int], copies: int) -> Expansion:
    """Plans `copies` copies: choice c is the nth_C[c]-th of row row_C[c] and becomes copy copy_C[c].

    `depths[k]` is the number of rows with more than k choices.
    """
    order_P = torch.zeros(rows, dtype=torch.int64, device=row_C.device).scatter_add_(0, row_C, torch.ones_like(row_C))
    order_P = order_P.argsort(descending=True, stable=True)
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(rows, device=row_C.device)
    starts = on_device(torch.tensor([0, *accumulate(depths)]), row_C.device)
    in_order_C = torch.empty_like(copy_C)
    in_order_C[starts[nth_C] + place_P[row_C]] = copy_C
    row_R = torch.full((copies,), -1, device=row_C.device)
    row_R[copy_C] = row_C
    filled_R = None if copies == len(row_C) else row_R >= 0
    return Expansion(row_R if filled_R is None else row_R.clamp(min=0), copy_C, place_P, in_order_C.split(depths), filled_R)


def expand(x_PD: Tensor, expansion: Expansion) -> Tensor:
    """Copies rows, (P, D) to (R, D), with zeros for padding. Differentiable."""
    return _Expand.apply(x_PD, expansion)  # pyright: ignore[reportReturnType]


def reduce(y_RD: Tensor, expansion: Expansion, weights_C: Tensor | None = None) -> Tensor:
    """Sums the copies of each row, times the weights of their choices, (R, D) to (P, D); in fp32 or wider. Differentiable."""
    return _Reduce.apply(y_RD, weights_C, expansion)  # pyright: ignore[reportReturnType]


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, expansion: Expansion) -> Tensor:
        ctx.expansion = expansion
        return _gather(x_PD, expansion)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _sum(grads[0], ctx.expansion, None), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_C: Tensor | None, expansion: Expansion) -> Tensor:
        ctx.expansion, weights_R = expansion, None
        if weights_C is not None:
            weights_R = weights_C.new_zeros(len(expansion.row_R))  # 0 for padding
            weights_R[expansion.copy_C] = weights_C
            ctx.save_for_backward(y_RD, weights_R)
        return _sum(y_RD, expansion, weights_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        expansion: Expansion = ctx.expansion
        grad_RD = _gather(grads[0], expansion)
        saved = ctx.saved_tensors  # once: recomputation gives each tensor a single time
        if not saved:
            return grad_RD, None, None
        y_RD, weights_R = saved
        # Widened before the product: the router's gradient is not rounded to bf16.
        grad_weights_R = (y_RD.to(weights_R.dtype) * grad_RD).sum(dim=-1)
        return (grad_RD * weights_R.unsqueeze(-1)).to(y_RD.dtype), grad_weights_R[expansion.copy_C], None


def _gather(x_PD: Tensor, expansion: Expansion) -> Tensor:
    if not len(x_PD):
        return x_PD.new_zeros(len(expansion.row_R), x_PD.shape[1])
    rows_RD = x_PD.index_select(0, expansion.row_R)
    return rows_RD if expansion.filled_R is None else rows_RD.masked_fill_(~expansion.filled_R.unsqueeze(-1), 0.0)


def _sum(y_RD: Tensor, expansion: Expansion, weights_R: Tensor | None) -> Tensor:
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    total_PD = torch.zeros(len(expansion.place_P), y_RD.shape[1], dtype=wide, device=y_RD.device)
    for copies in expansion.copies:  # the copies have no name, which would keep them while the next ones are gathered
        if weights_R is None:
            total_PD[: len(copies)] += y_RD.index_select(0, copies).to(wide)
        else:
            total_PD[: len(copies)].addcmul_(y_RD.index_select(0, copies).to(wide), weights_R[copies].unsqueeze(-1).to(wide))
    return total_PD.to(y_RD.dtype).index_select(0, expansion.place_P)


class ExpertChoices(NamedTuple):
    """Choice c: row `row_C[c]` (ascending) goes to expert `expert_C[c]` of the E experts in reach, or is dropped (E).

    The experts of a row differ from each other.
    """

    rows: int
    row_C: Tensor
    expert_C: Tensor
    weights_C: Tensor
    top_k: int
    """K."""
    padded_rows: int | None
    """Rows that each expert gets in the end, padding included; None: as many as chose it."""


class LocalChoices(NamedTuple):
    """Choices of this rank's experts: choice c is the `nth_C[c]`-th of its row, and `depths[k]` rows have more than k."""

    choices: ExpertChoices
    nth_C: Tensor
    depths: list[int]


def assumed_depths(rows: int, choices: int, ranks: int, top_k: int) -> list[int]:
    """Returns `depths` as a dry run assumes it for one of the ranks, over which the choices are spread at random.

    So a row has any choice there with probability 1 - (1 - 1 / ranks) ** (choices / rows).
    """
    of_rank = choices // ranks
    have_any = max(math.ceil(rows * (1 - (1 - 1 / ranks) ** (choices / max(rows, 1)))), -(-of_rank // top_k))
    return [min(have_any, max(0, of_rank - k * have_any)) for k in range(top_k)]


def choices_of(routing: Routing, experts: int, ranks: int) -> ExpertChoices:
    """Returns the choices of this rank's tokens. With padding, each of `ranks` ranks may fill its part of an expert's rows."""
    tokens, top_k = routing.experts_TK.shape
    expert_TK = experts_or_dropped(routing, experts)
    row_C = torch.arange(tokens, device=expert_TK.device).repeat_interleave(top_k)
    padded = None if routing.padded_rows is None else routing.padded_rows * ranks
    return ExpertChoices(tokens, row_C, expert_TK.flatten(), routing.weights_TK.flatten(), top_k, padded)


def plan_expert_rows(local: LocalChoices, experts: int) -> tuple[Expansion, Tensor]:
    """Plans the rows of this rank's `experts`. Returns the expansion to them, and the number of rows of each expert."""
    choices = local.choices
    plan = plan_choices(choices.expert_C.unsqueeze(1), experts, choices.padded_rows, dropping=False)
    copy_C = plan.slot_TK.flatten()
    return plan_expansion(choices.row_C, local.nth_C, copy_C, choices.rows, local.depths, len(plan.token_R)), plan.counts_E
