"""Token rows to their experts and back, on one device: one stable sort gives the permutation and its inverse.

T tokens, D width, E experts, K choices per token, A = T * K choices, R rows that arrive (choices that are kept).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .device import host_read, kind_of
from .products import arithmetic
from .router import Routing
from .rows import Choices, Plan, copy_to_rows, weighted_sum


class Arrived(NamedTuple):
    """The rows for this device's experts, in the order of the experts, and what `combine` needs to take them back."""

    tokens_RD: Tensor
    counts_E: Tensor
    way_back: Any


Compute = Callable[..., Tensor]
"""The experts, called as `Experts.forward`."""
Beside = Callable[[], Any]
"""Something that needs nothing of the experts."""


class Passed(NamedTuple):
    """Tokens that have been through their experts."""

    y_TD: Tensor
    beside: Any
    """What `Beside` gave."""
    rows: int
    """Rows that this device's experts computed, of tokens of other ranks too."""


class Dispatcher(ABC):
    """Brings token rows to the experts and their outputs back. Holds no parameters and no state between the two calls."""

    @abstractmethod
    def dispatch(self, x_TD: Tensor, routing: Routing) -> Arrived:
        """Copy each token of (T, D) to a row for each of its kept experts."""

    @abstractmethod
    def combine(self, y_RD: Tensor, arrived: Arrived) -> Tensor:
        """Each token's weighted sum of its experts' rows: (R, D) to (T, D)."""

    def run(self, x_TD: Tensor, routing: Routing, experts: Compute, beside: Beside) -> Passed:
        """Dispatch, experts, combine: (T, D) to (T, D). And what `beside` gives, which is computed while rows travel."""
        arrived = self.dispatch(x_TD, routing)
        y_RD = experts(arrived.tokens_RD, arrived.counts_E)
        return Passed(self.combine(y_RD, arrived), beside(), len(y_RD))


class LocalDispatcher(Dispatcher):
    """All experts are on this device."""

    def __init__(self, experts: int) -> None:
        self.experts = experts

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Arrived:
        plan = plan_rows(routing, self.experts)
        return Arrived(copy_to_rows(x_TD, plan), plan.counts_E, (plan, routing.weights_TK))

    def combine(self, y_RD: Tensor, arrived: Arrived) -> Tensor:
        plan, weights_TK = arrived.way_back
        return weighted_sum(y_RD, weights_TK, plan)


class FusedDispatcher(LocalDispatcher):
    """The same with all three steps inside of the experts' function, which then keeps no row for the backward pass."""

    def run(self, x_TD: Tensor, routing: Routing, experts: Compute, beside: Beside) -> Passed:
        plan = plan_rows(routing, self.experts)
        rows = len(plan.token_R)
        if plan.filled_R is None and (multiple := alignment(x_TD)) > 1:
            plan = rounded_up(plan, chosen(routing, self.experts), multiple)
        return Passed(experts(x_TD, plan.counts_E, Choices(plan, routing.weights_TK)), beside(), rows)


def plan_rows(routing: Routing, experts: int) -> Plan:
    """Rows in the order of (expert, token). With dropping, the number of rows is read on the host (a synchronisation)."""
    return plan_choices(chosen(routing, experts), experts, routing.padded_rows, dropping=routing.kept_TK is not None)


def chosen(routing: Routing, experts: int) -> Tensor:
    """(T, K): the experts, and `experts` for what was dropped."""
    return routing.experts_TK if routing.kept_TK is None else routing.experts_TK.masked_fill(~routing.kept_TK, experts)


def plan_choices(experts_TK: Tensor, experts: int, padded_rows: int | None, dropping: bool, counts_E: Tensor | None = None) -> Plan:
    """See `plan_rows`. With padding each expert has the same number of rows, zeros behind its tokens, and nothing is read.

    `counts_E` is what `count_rows` gives, if it is known already.
    """
    top_k = experts_TK.shape[1]
    counts_E = count_rows(experts_TK, experts) if counts_E is None else counts_E
    chosen_A = experts_TK.flatten()
    order_A = chosen_A.argsort(stable=True)
    slot_A = torch.empty_like(order_A)
    slot_A[order_A] = torch.arange(len(order_A), device=order_A.device)
    kept_TK = experts_TK < experts if dropping else None
    if padded_rows is not None:
        plan = Plan(order_A // top_k, slot_A.view_as(experts_TK), counts_E, kept_TK=kept_TK)
        return _filled(plan, chosen_A, torch.full_like(counts_E, padded_rows), experts * padded_rows)
    rows, slot_TK = len(order_A), slot_A.view_as(experts_TK)
    if kept_TK is not None:
        rows, slot_TK = host_read(counts_E.sum(), "kept choices", lambda: len(order_A)), slot_TK.masked_fill(~kept_TK, -1)
    return Plan(order_A[:rows] // top_k, slot_TK, counts_E, kept_TK=kept_TK)


def count_rows(experts_TK: Tensor, experts: int) -> Tensor:
    """int64 (E,): how many choices each expert has; those of `experts`, which were dropped, are not counted."""
    chosen_A = experts_TK.flatten()
    counts_E = torch.zeros(experts + 1, dtype=torch.int64, device=chosen_A.device)
    return counts_E.scatter_add_(0, chosen_A, torch.ones_like(chosen_A))[:experts]


def alignment(x: Tensor) -> int:
    """What the number of an expert's rows must be a multiple of.

    Where a CPU multiplies bf16, oneDNN compiles a kernel for each number of rows that it has not seen, and a dropless layer has new
    ones each step; with few sizes the allocator finds what fits, too, which saves memory.
    """
    return 32 if kind_of(x) == "cpu" and arithmetic(x) == torch.bfloat16 else 1


def rounded_up(plan: Plan, experts_TK: Tensor, multiple: int) -> Plan:
    """`plan` with each expert's rows filled up to a multiple; the number of rows is read on the host."""
    rows_E = (plan.counts_E + multiple - 1) // multiple * multiple
    rows = host_read(
        rows_E.sum(), "rounded rows", lambda: len(rows_E) * -(-experts_TK.numel() // (len(rows_E) * multiple)) * multiple
    )
    return _filled(plan, experts_TK.flatten(), rows_E, rows)


def _filled(plan: Plan, chosen_A: Tensor, rows_E: Tensor, rows: int) -> Plan:
    """`plan` with rows_E rows for each expert, zeros behind its tokens; `rows` of all. Dropped choices may still be in it, last."""
    shift_E = (rows_E.cumsum(0) - rows_E) - (plan.counts_E.cumsum(0) - plan.counts_E)
    slot_A = plan.slot_TK.flatten() + torch.cat([shift_E, shift_E.new_zeros(1)])[chosen_A]
    if plan.kept_TK is not None:
        slot_A = slot_A.masked_fill(~plan.kept_TK.flatten(), -1)
    choice_R = torch.full((rows + 1,), -1, device=chosen_A.device)
    choice_R[slot_A] = torch.arange(len(slot_A), device=chosen_A.device)  # dropped choices land in the extra last place
    choice_R, slot_TK = choice_R[:-1], slot_A.view_as(plan.slot_TK)
    token_R = choice_R.clamp(min=0) // slot_TK.shape[1]
    return Plan(token_R, slot_TK, rows_E, choice_R >= 0, plan.kept_TK)
