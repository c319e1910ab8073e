"""Which rows want which experts, where a row of a rank may want any number of them; and the rows of this rank's own experts.

P rows, C choices, K the most choices of a row, E experts in reach, D width, R rows of experts.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...moe.dispatch import chosen, plan_choices
from ...moe.router import Routing
from .fan import Fan, plan_fan


class Choices(NamedTuple):
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

    choices: Choices
    nth_C: Tensor
    deeper: list[int]


def assumed_depths(rows: int, choices: int, ranks: int, most: int) -> list[int]:
    """[k]: how many of the rows have more than k choices at one of the ranks, as a dry run assumes it.

    A row's choices are spread over the ranks at random, so it has any with probability 1 - (1 - 1 / ranks) ** (choices / rows).
    """
    left = choices // ranks
    have_any = max(math.ceil(rows * (1 - (1 - 1 / ranks) ** (choices / max(rows, 1)))), -(-left // most))
    return [min(have_any, max(0, left - k * have_any)) for k in range(most)]


def choices_of(routing: Routing, experts: int, ranks: int) -> Choices:
    """The choices of this rank's tokens; with padding, each of `ranks` ranks may fill its part of an expert's rows."""
    tokens, top_k = routing.experts_TK.shape
    expert_TK = chosen(routing, experts)
    row_C = torch.arange(tokens, device=expert_TK.device).repeat_interleave(top_k)
    padded = None if routing.padded_rows is None else routing.padded_rows * ranks
    return Choices(tokens, row_C, expert_TK.flatten(), routing.weights_TK.flatten(), top_k, padded)


def plan_expansion(counted: Counted, experts: int) -> tuple[Fan, Tensor]:
    """How rows fan out to this rank's `experts`, and how many rows each gets."""
    choices = counted.choices
    plan = plan_choices(choices.expert_C.unsqueeze(1), experts, choices.padded_rows, dropping=False)
    fan = plan_fan(choices.row_C, counted.nth_C, plan.slot_TK.flatten(), choices.rows, counted.deeper, len(plan.token_R))
    return fan, plan.counts_E
