"""Rows that have different numbers of copies: make the copies, and add what became of them up again.

Both directions are gathers, as in moe/dispatch.py; the work is that of the copies there are, not of the most a row may have.
P rows, C choices (each is one copy of one row), R copies (padding included), D width.
"""

import math
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...moe.dispatch import chosen, plan_choices
from ...moe.router import Routing
from ..streams import on_device


class Fan(NamedTuple):
    """Copy r is of row `row_R[r]`; choice c is copy `copy_C[c]`.

    Rows are taken in the order of their number of copies, most first, where row p is at `place_P[p]`: the k-th copies of the first
    rows in that order are `copies[k]`. `filled_R` is False for copies that are padding; None where there is none.
    """

    row_R: Tensor
    copy_C: Tensor
    place_P: Tensor
    copies: tuple[Tensor, ...]
    filled_R: Tensor | None = None


def plan_fan(row_C: Tensor, nth_C: Tensor, copy_C: Tensor, rows: int, deeper: list[int], copies: int) -> Fan:
    """Choice c is the nth_C[c]-th of row row_C[c] and becomes copy copy_C[c] of `copies`; `deeper[k]` rows have more than k."""
    order_P = torch.zeros(rows, dtype=torch.int64, device=row_C.device).scatter_add_(0, row_C, torch.ones_like(row_C))
    order_P = order_P.argsort(descending=True, stable=True)
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(rows, device=row_C.device)
    starts = on_device(torch.tensor([0, *accumulate(deeper)]), row_C.device)
    in_order_C = torch.empty_like(copy_C)
    in_order_C[starts[nth_C] + place_P[row_C]] = copy_C
    row_R = torch.full((copies,), -1, device=row_C.device)
    row_R[copy_C] = row_C
    filled_R = None if copies == len(row_C) else row_R >= 0
    return Fan(row_R if filled_R is None else row_R.clamp(min=0), copy_C, place_P, in_order_C.split(deeper), filled_R)


def copy_out(x_PD: Tensor, fan: Fan) -> Tensor:
    """(P, D) to (R, D), zeros where nothing is filled in; differentiable."""
    return _CopyOut.apply(x_PD, fan)  # pyright: ignore[reportReturnType]


def add_up(y_RD: Tensor, fan: Fan, weights_C: Tensor | None = None) -> Tensor:
    """(R, D) to (P, D): the sum of each row's copies, times their choice's weight; in fp32 or wider. Differentiable."""
    return _AddUp.apply(y_RD, weights_C, fan)  # pyright: ignore[reportReturnType]


class _CopyOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, fan: Fan) -> Tensor:
        ctx.fan = fan
        return _copies(x_PD, fan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _sum(grads[0], ctx.fan, None), None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_C: Tensor | None, fan: Fan) -> Tensor:
        weights_R = None if weights_C is None else _of_copies(weights_C, fan)
        ctx.fan = fan
        ctx.save_for_backward(*((y_RD, weights_R) if weights_R is not None else ()))
        return _sum(y_RD, fan, weights_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        fan: Fan = ctx.fan
        grad_RD = _copies(grads[0], fan)
        saved = ctx.saved_tensors  # once: recomputation gives each tensor a single time
        if not saved:
            return grad_RD, None, None
        y_RD, weights_R = saved
        # Widened before the product: the router's gradient is not rounded to bf16.
        grad_weights_R = (y_RD.to(weights_R.dtype) * grad_RD).sum(dim=-1)
        return (grad_RD * weights_R.unsqueeze(-1)).to(y_RD.dtype), grad_weights_R[fan.copy_C], None


def _copies(x_PD: Tensor, fan: Fan) -> Tensor:
    """(R, D): each copy's row, zeros for padding."""
    if not len(x_PD):
        return x_PD.new_zeros(len(fan.row_R), x_PD.shape[1])
    rows_RD = x_PD.index_select(0, fan.row_R)
    return rows_RD if fan.filled_R is None else rows_RD.masked_fill_(~fan.filled_R.unsqueeze(-1), 0.0)


def _of_copies(weights_C: Tensor, fan: Fan) -> Tensor:
    """(R,): each copy's weight, 0 for padding."""
    weights_R = weights_C.new_zeros(len(fan.row_R))
    weights_R[fan.copy_C] = weights_C
    return weights_R


def _sum(y_RD: Tensor, fan: Fan, weights_R: Tensor | None) -> Tensor:
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    total_PD = torch.zeros(len(fan.place_P), y_RD.shape[1], dtype=wide, device=y_RD.device)
    for copies in fan.copies:
        rows = y_RD.index_select(0, copies).to(wide)
        if weights_R is None:
            total_PD[: len(copies)] += rows
        else:
            total_PD[: len(copies)].addcmul_(rows, weights_R[copies].unsqueeze(-1).to(wide))
    return total_PD.to(y_RD.dtype).index_select(0, fan.place_P)


# Which rows want which experts, where a row of a rank may want any number of them; and the rows of this rank's own experts.
#
# P rows, C choices, K the most choices of a row, E experts in reach, D width, R rows of experts.


class ExpertChoices(NamedTuple):
    """Choice c: row `row_C[c]` (ascending) wants expert `expert_C[c]` of those in reach (E: none, it was dropped).

    A row's experts differ, as those of a router do.
    """

    rows: int
    row_C: Tensor
    expert_C: Tensor
    weights_C: Tensor
    most: int
    """K."""
    padded_rows: int | None
    """Rows that each expert gets in the end, zeros included; None: as many as chose it."""


class Counted(NamedTuple):
    """All choices are of experts of this rank: choice c is its row's `nth_C[c]`-th, and `deeper[k]` rows have more than k."""

    choices: ExpertChoices
    nth_C: Tensor
    deeper: list[int]


def assumed_depths(rows: int, choices: int, ranks: int, most: int) -> list[int]:
    """[k]: how many of the rows have more than k choices at one of the ranks, as a dry run assumes it.

    A row's choices are spread over the ranks at random, so it has any with probability 1 - (1 - 1 / ranks) ** (choices / rows).
    """
    left = choices // ranks
    have_any = max(math.ceil(rows * (1 - (1 - 1 / ranks) ** (choices / max(rows, 1)))), -(-left // most))
    return [min(have_any, max(0, left - k * have_any)) for k in range(most)]


def choices_of(routing: Routing, experts: int, ranks: int) -> ExpertChoices:
    """The choices of this rank's tokens; with padding, each of `ranks` ranks may fill its part of an expert's rows."""
    tokens, top_k = routing.experts_TK.shape
    expert_TK = chosen(routing, experts)
    row_C = torch.arange(tokens, device=expert_TK.device).repeat_interleave(top_k)
    padded = None if routing.padded_rows is None else routing.padded_rows * ranks
    return ExpertChoices(tokens, row_C, expert_TK.flatten(), routing.weights_TK.flatten(), top_k, padded)


def plan_expansion(counted: Counted, experts: int) -> tuple[Fan, Tensor]:
    """How rows fan out to this rank's `experts`, and how many rows each gets."""
    choices = counted.choices
    plan = plan_choices(choices.expert_C.unsqueeze(1), experts, choices.padded_rows, dropping=False)
    fan = plan_fan(choices.row_C, counted.nth_C, plan.slot_TK.flatten(), choices.rows, counted.deeper, len(plan.token_R))
    return fan, plan.counts_E
