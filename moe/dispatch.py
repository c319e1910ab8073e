"""Dispatches token rows to the experts and combines their outputs, on one device: one stable sort gives both permutations.

Every direction is a gather, forward and backward: no atomic additions, so the same bits every time.
T tokens, D width, E experts, K choices per token, A = T * K choices, R rows of experts (choices that are kept, and padding).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .device import host_read, kind_of, uses_kernels
from .kernels import operators
from .linear import compute_dtype
from .router import Routing

MAX_ELEMENTS = 2**26
"""Elements of weighted rows that exist at a time on a GPU: 0.4 GB in bf16 and fp32."""


class RowPlan(NamedTuple):
    """Row r is a copy of token `token_R[r]`; choice k of token t is row `slot_TK[t, k]`, or -1 if it is dropped.

    Rows are in the order of the experts, counts_E of each. `filled_R` is False for rows of padding: zeros, whose outputs are
    ignored; None if there are none. `kept_TK` is False for dropped choices; None if nothing is dropped.
    """

    token_R: Tensor
    slot_TK: Tensor
    counts_E: Tensor
    filled_R: Tensor | None = None
    kept_TK: Tensor | None = None


class Choices(NamedTuple):
    """How to make rows of tokens and sum them up again: the plan, the weight of each choice, and the keys for dropout, if any."""

    plan: RowPlan
    weights_TK: Tensor
    keys_T: Tensor | None = None


def permute(x_TD: Tensor, plan: RowPlan) -> Tensor:
    """Copies tokens (T, D) to rows (R, D). Differentiable."""
    return _Permute.apply(x_TD, *plan)  # pyright: ignore[reportReturnType]


def unpermute(y_RD: Tensor, weights_TK: Tensor, plan: RowPlan) -> Tensor:
    """Sums the weighted rows (R, D) of each token, (T, D), in fp32 or wider. Differentiable in rows and weights."""
    return _Unpermute.apply(y_RD, weights_TK, *plan)  # pyright: ignore[reportReturnType]


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, *plan: Any) -> Tensor:
        ctx.save_for_backward(*plan)
        return gather_rows(x_TD, RowPlan(*plan))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return sum_rows(grads[0], RowPlan(*ctx.saved_tensors)), *5 * [None]


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_TK: Tensor, *plan: Any) -> Tensor:
        ctx.save_for_backward(y_RD, weights_TK, *plan)
        return sum_rows(y_RD, RowPlan(*plan), weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y_RD, weights_TK, *saved = ctx.saved_tensors
        plan = RowPlan(*saved)
        grad_y_RD, grad_weights_R = sum_rows_backward(grads[0], y_RD, plan, weights_TK)
        return grad_y_RD, values_per_choice(grad_weights_R, plan), *5 * [None]


def gather_rows(x_TD: Tensor, plan: RowPlan) -> Tensor:
    """(R, D): the token of each row, zeros for padding."""
    if uses_kernels(x_TD):
        return operators.copy_rows(x_TD, plan.slot_TK, plan.filled_R, len(plan.token_R))
    rows_RD = x_TD.index_select(0, plan.token_R)
    return rows_RD if plan.filled_R is None else rows_RD.masked_fill_(~plan.filled_R.unsqueeze(-1), 0.0)


def sum_rows(y_RD: Tensor, plan: RowPlan, weights_TK: Tensor | None = None) -> Tensor:
    """(T, D) in the dtype of y_RD: the sum of each token's rows, times their weights; dropped choices add nothing.

    Sums in fp32 or wider.
    """
    if not len(y_RD):
        return y_RD.new_zeros(len(plan.slot_TK), y_RD.shape[1])
    if uses_kernels(y_RD):
        return operators.sum_rows(y_RD, plan.slot_TK, weights_TK)
    slot_TK, factors_TK = plan.slot_TK, weights_TK
    if plan.kept_TK is not None:
        slot_TK = slot_TK.clamp(min=0)
        factors_TK = plan.kept_TK if weights_TK is None else weights_TK * plan.kept_TK
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    if weights_TK is None or y_RD.dtype == wide:  # one pass over the rows, but the weights must have their dtype
        factors_TK = None if factors_TK is None else factors_TK.to(y_RD.dtype)
        return F.embedding_bag(slot_TK, y_RD, mode="sum", per_sample_weights=factors_TK)
    assert factors_TK is not None
    weighted_sum = _weighted_sum_by_choice if kind_of(y_RD) == "cpu" else _weighted_sum_by_block
    return weighted_sum(y_RD, slot_TK, factors_TK.to(wide))


def sum_rows_backward(grad_TD: Tensor, y_RD: Tensor, plan: RowPlan, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the rows (R, D), and of their weights (R,) in the dtype of the weights."""
    weights_R = weights_per_row(weights_TK, plan)
    if uses_kernels(y_RD):
        grad_y_RD, grad_weights_R = operators.unpermute_backward(grad_TD, y_RD, plan.token_R, plan.filled_R, weights_R)
        return grad_y_RD, grad_weights_R.to(weights_TK.dtype)
    grad_RD = gather_rows(grad_TD, plan)
    grad_weights_R = row_dots(y_RD, grad_RD, weights_TK.dtype)
    return grad_RD.mul_(weights_R[:, None]), grad_weights_R


def _weighted_sum_by_choice(y_RD: Tensor, slot_TK: Tensor, factors_TK: Tensor) -> Tensor:
    """Sums in the dtype of the factors, with little memory; three operators for each choice."""
    total_TD = torch.zeros(len(slot_TK), y_RD.shape[1], dtype=factors_TK.dtype, device=y_RD.device)
    for slot_T, factor_T in zip(slot_TK.unbind(1), factors_TK.unbind(1), strict=True):
        total_TD.addcmul_(y_RD.index_select(0, slot_T).to(factors_TK.dtype), factor_T[:, None])
    return total_TD.to(y_RD.dtype)


def _weighted_sum_by_block(y_RD: Tensor, slot_TK: Tensor, factors_TK: Tensor) -> Tensor:
    """Sums in the dtype of the factors, in four operators whatever K is, for `MAX_ELEMENTS` at a time."""
    total_TD = y_RD.new_empty(len(slot_TK), y_RD.shape[1])
    tokens = max(1, MAX_ELEMENTS // (slot_TK.shape[1] * y_RD.shape[1]))
    for total_tD, slot_tK, factors_tK in zip(*(x.split(tokens) for x in (total_TD, slot_TK, factors_TK)), strict=True):
        rows_tKD = y_RD.index_select(0, slot_tK.flatten()).view(*slot_tK.shape, -1)
        total_tD.copy_((rows_tKD * factors_tK.unsqueeze(-1)).sum(1))
    return total_TD


def row_dots(a_RD: Tensor, b_RD: Tensor, wide: torch.dtype) -> Tensor:
    """(R,): the dot product of each row of `a` with that of `b`, in `wide`; the product of two bf16 numbers is exact in fp32."""
    if a_RD.dtype == wide:
        return (a_RD * b_RD).sum(-1)
    if kind_of(a_RD) == "cpu":
        return a_RD.to(wide).mul_(b_RD).sum(-1)
    return torch.addcmul(a_RD.new_zeros(1, 1, dtype=wide), a_RD, b_RD).sum(-1)  # without a wide copy of either


def weights_per_row(weights_TK: Tensor, plan: RowPlan) -> Tensor:
    """(R,): the weight of each row's choice, 0 for padding."""
    if plan.kept_TK is None and plan.filled_R is None:
        return torch.empty_like(weights_TK).flatten().index_copy_(0, plan.slot_TK.flatten(), weights_TK.flatten())
    weights_R = weights_TK.new_zeros(len(plan.token_R) + 1)
    weights_R[plan.slot_TK.flatten()] = weights_TK.flatten()  # dropped choices (-1) write to the extra last element
    return weights_R[:-1]


def values_per_choice(values_R: Tensor, plan: RowPlan) -> Tensor:
    """(T, K): the value of each choice's row, 0 for dropped choices."""
    if not len(values_R):
        return values_R.new_zeros(plan.slot_TK.shape)
    if plan.kept_TK is None:
        return values_R[plan.slot_TK]
    return values_R[plan.slot_TK.clamp(min=0)] * plan.kept_TK


class DispatchedTokens(NamedTuple):
    """The rows for this device's experts, in the order of the experts, and the metadata that `combine` needs."""

    tokens_RD: Tensor
    counts_E: Tensor
    metadata: Any
    keys_R: Tensor | None = None
    """int64: the random key of each row's token, for dropout inside of the experts; None if there is none."""

    def through(self, experts: "ExpertsFn") -> Tensor:
        """Returns the experts' outputs of the rows, (R, D)."""
        if self.keys_R is None:
            return experts(self.tokens_RD, self.counts_E)
        return experts(self.tokens_RD, self.counts_E, keys_R=self.keys_R)


ExpertsFn = Callable[..., Tensor]
"""The experts, called as `Experts.forward`."""
OverlapFn = Callable[[], Callable[[], Any]]
"""The first half of a computation that does not depend on the experts. Returns the second half, which returns the result."""


class DispatcherOutput(NamedTuple):
    y_TD: Tensor
    overlapped: Any
    """The result of the second half of the `OverlapFn`."""
    rows: int | Tensor
    """Rows that this device's experts computed, those of other ranks' tokens and padding included."""
    overflow: Tensor | None = None
    """int64 scalar: choices of this rank that the exchange had no room for; None if it has room for all."""


class Dispatcher(ABC):
    """Brings token rows to the experts and their outputs back. Holds no parameters, and no state between the two calls."""

    @abstractmethod
    def dispatch(self, x_TD: Tensor, routing: Routing) -> DispatchedTokens:
        """Copies each token of (T, D) to a row for each of its kept experts."""

    @abstractmethod
    def combine(self, y_RD: Tensor, dispatched: DispatchedTokens) -> Tensor:
        """Returns the weighted sum of the rows of each token: (R, D) to (T, D)."""

    def run(self, x_TD: Tensor, routing: Routing, experts: ExpertsFn, overlap_fn: OverlapFn) -> DispatcherOutput:
        """Dispatch, experts, combine: (T, D) to (T, D). Calls the halves of `overlap_fn` while rows travel there and back."""
        dispatched = self.dispatch(x_TD, routing)
        y_RD = dispatched.through(experts)
        rows = dispatched.counts_E.sum() if torch.compiler.is_compiling() else len(y_RD)
        return DispatcherOutput(self.combine(y_RD, dispatched), overlap_fn()(), rows)


class LocalDispatcher(Dispatcher):
    """All experts are on this device."""

    def __init__(self, experts: int) -> None:
        self.experts = experts

    def dispatch(self, x_TD: Tensor, routing: Routing) -> DispatchedTokens:
        plan = plan_rows(routing, self.experts)
        keys_R = None if routing.keys_T is None else routing.keys_T.index_select(0, plan.token_R)
        return DispatchedTokens(permute(x_TD, plan), plan.counts_E, (plan, routing.weights_TK), keys_R)

    def combine(self, y_RD: Tensor, dispatched: DispatchedTokens) -> Tensor:
        plan, weights_TK = dispatched.metadata
        return unpermute(y_RD, weights_TK, plan)


class FusedDispatcher(LocalDispatcher):
    """Leaves all three steps to the experts' autograd function, which then keeps no row for the backward pass."""

    def run(self, x_TD: Tensor, routing: Routing, experts: ExpertsFn, overlap_fn: OverlapFn) -> DispatcherOutput:
        plan = plan_rows(routing, self.experts)
        rows = plan.counts_E.sum() if torch.compiler.is_compiling() else len(plan.token_R)
        if plan.filled_R is None and (multiple := row_alignment(x_TD)) > 1:
            plan = pad_to_multiple(plan, experts_or_dropped(routing, self.experts), multiple)
        choices = Choices(plan, routing.weights_TK, routing.keys_T)
        return DispatcherOutput(experts(x_TD, plan.counts_E, choices), overlap_fn()(), rows)


def plan_rows(routing: Routing, experts: int) -> RowPlan:
    """Plans rows in the order of (expert, token). With dropping, the host reads the number of rows (a synchronisation).

    Compiled code reads nothing: its rows are as many as there can be.
    """
    dropping, cut = routing.kept_TK is not None, not torch.compiler.is_compiling()
    return plan_choices(experts_or_dropped(routing, experts), experts, routing.padded_rows, dropping, cut=cut)


def experts_or_dropped(routing: Routing, experts: int) -> Tensor:
    """(T, K): the chosen experts, and `experts` for dropped choices."""
    return routing.experts_TK if routing.kept_TK is None else routing.experts_TK.masked_fill(~routing.kept_TK, experts)


class CountedChoices(NamedTuple):
    """The choices of each expert, and on a GPU what its kernels counted besides (moe/kernels/row_plan.py). C chunks of choices."""

    counts_E: Tensor
    """int64, without dropped choices (which have the id E)."""
    begin_E: Tensor | None = None
    before_CE: Tensor | None = None


def plan_choices(
    experts_TK: Tensor,
    experts: int,
    padded_rows: int | None,
    dropping: bool,
    counted: CountedChoices | None = None,
    cut: bool = True,
) -> RowPlan:
    """See `plan_rows`. With `padded_rows`, each expert has that many rows, and the host reads nothing.

    `counted` is the result of `count_rows`, if it is known already. Without `cut`, there are as many rows as choices: those behind
    the last kept one are of any token, and the host reads nothing either.
    """
    top_k = experts_TK.shape[1]
    counts_E, begin_E, before_CE = counted or count_rows(experts_TK, experts)
    if begin_E is not None and before_CE is not None:
        tensors = experts_TK, counts_E, begin_E, before_CE
        token_R, slot_TK, kept_TK, filled_R, rows_E = operators.place_rows(*tensors, padded_rows, dropping)
        kept_TK = kept_TK if dropping else None
        if padded_rows is not None:
            return RowPlan(token_R, slot_TK, rows_E, filled_R, kept_TK)
        rows = _kept_rows(counts_E, len(token_R)) if dropping and cut else len(token_R)
        return RowPlan(token_R[:rows], slot_TK, counts_E, kept_TK=kept_TK)
    chosen_A = experts_TK.flatten()
    order_A = chosen_A.argsort(stable=True)
    slot_A = torch.empty_like(order_A)
    slot_A[order_A] = torch.arange(len(order_A), device=order_A.device)
    kept_TK = experts_TK < experts if dropping else None
    if padded_rows is not None:
        plan = RowPlan(order_A // top_k, slot_A.view_as(experts_TK), counts_E, kept_TK=kept_TK)
        return _pad(plan, chosen_A, torch.full_like(counts_E, padded_rows), experts * padded_rows)
    rows, slot_TK = len(order_A), slot_A.view_as(experts_TK)
    if kept_TK is not None:
        rows, slot_TK = _kept_rows(counts_E, rows) if cut else rows, slot_TK.masked_fill(~kept_TK, -1)
    return RowPlan(order_A[:rows] // top_k, slot_TK, counts_E, kept_TK=kept_TK)


def _kept_rows(counts_E: Tensor, choices: int) -> int:
    return host_read(counts_E.sum(), "kept choices", lambda: choices)


def count_rows(experts_TK: Tensor, experts: int) -> CountedChoices:
    """Counts the choices of each expert, without dropped ones (which have the id `experts`)."""
    if experts <= operators.MOST_EXPERTS and uses_kernels(experts_TK):
        return CountedChoices(*operators.count_rows(experts_TK, experts))
    chosen_A = experts_TK.flatten()
    counts_E = torch.zeros(experts + 1, dtype=torch.int64, device=chosen_A.device)
    return CountedChoices(counts_E.scatter_add_(0, chosen_A, torch.ones_like(chosen_A))[:experts])


def row_alignment(x: Tensor) -> int:
    """The number of rows of an expert should be a multiple of this.

    For bf16 on a CPU oneDNN compiles a kernel for each number of rows that it has not seen, and a dropless layer has new ones in
    each step. With few sizes the allocator also finds free blocks that fit, which saves memory.
    """
    return 32 if kind_of(x) == "cpu" and compute_dtype(x) == torch.bfloat16 else 1


def pad_to_multiple(plan: RowPlan, experts_TK: Tensor, multiple: int) -> RowPlan:
    """Pads the rows of each expert to a multiple. The host reads their number (a synchronisation), except in compiled code."""
    rows_E = (plan.counts_E + multiple - 1) // multiple * multiple
    if torch.compiler.is_compiling():
        return _pad(plan, experts_TK.flatten(), rows_E, experts_TK.numel() + len(rows_E) * (multiple - 1))
    rows = host_read(
        rows_E.sum(), "rounded rows", lambda: len(rows_E) * -(-experts_TK.numel() // (len(rows_E) * multiple)) * multiple
    )
    return _pad(plan, experts_TK.flatten(), rows_E, rows)


def _pad(plan: RowPlan, chosen_A: Tensor, rows_E: Tensor, rows: int) -> RowPlan:
    """Pads the rows of each expert to rows_E, `rows` in all. `plan` may still have dropped choices, behind all others."""
    shift_E = (rows_E.cumsum(0) - rows_E) - (plan.counts_E.cumsum(0) - plan.counts_E)
    slot_A = plan.slot_TK.flatten() + torch.cat([shift_E, shift_E.new_zeros(1)])[chosen_A]
    if plan.kept_TK is not None:
        slot_A = slot_A.masked_fill(~plan.kept_TK.flatten(), -1)
    choice_R = torch.full((rows + 1,), -1, device=chosen_A.device)
    choice_R[slot_A] = torch.arange(len(slot_A), device=chosen_A.device)  # dropped choices write to the extra last element
    choice_R, slot_TK = choice_R[:-1], slot_A.view_as(plan.slot_TK)
    token_R = choice_R.clamp(min=0) // slot_TK.shape[1]
    return RowPlan(token_R, slot_TK, rows_E, choice_R >= 0, plan.kept_TK)
