"""The exchange by all-gather and reduce-scatter: every rank receives all tokens of the group and computes its own experts' part.

Rows are not sorted before they are sent and no counts are exchanged. Each token travels to all other N - 1 ranks, which is least
if its experts are on most ranks anyway: in small groups, with a large K.
T tokens here, G tokens of the whole group, K choices per token, E experts, L experts of a rank, C choices of this rank's experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...moe.device import host_read, hot_rows
from ...moe.dispatch import DispatchedTokens, experts_or_dropped
from ...moe.router import Routing
from ..collectives import stack_over
from ..mesh import Axis
from ..progress import waiting_for_device
from .async_collectives import AllGather, PendingRows
from .base import ExpertParallelDispatcher
from .expand import ExpertChoices, LocalChoices, assumed_depths, expand, plan_expert_rows, reduce


class StartedAllGather(NamedTuple):
    route: AllGather
    rows: PendingRows
    choices: PendingRows
    padded_rows: int | None
    keys: PendingRows | None
    """The random keys of the tokens, (G, 1); None without dropout inside of the experts."""


class AllGatherDispatcher(ExpertParallelDispatcher):
    """Each rank sums what its experts give for every token of the group; a reduce-scatter sums that over the ranks."""

    def __init__(self, experts: int, axis: Axis, chunks: int = 1) -> None:
        super().__init__(chunks)
        self.experts = experts
        self.axis = axis

    def start_dispatch(self, x_TD: Tensor, routing: Routing) -> StartedAllGather:
        route = AllGather(_tokens_of_each(x_TD, self.axis), self.axis)
        rows = route.start(x_TD, narrow=self.narrow)
        experts_TK = experts_or_dropped(routing, self.experts)
        choices = route.start(torch.cat([routing.weights_TK, experts_TK.to(routing.weights_TK.dtype)], dim=1))
        padded = None if routing.padded_rows is None else routing.padded_rows * self.axis.size
        keys = None if routing.keys_T is None else route.start(routing.keys_T.unsqueeze(1))
        return StartedAllGather(route, rows, choices, padded, keys)

    def finish_dispatch(self, started: StartedAllGather) -> DispatchedTokens:
        experts = self.experts // self.axis.size
        local = _local_choices(started.choices.wait(), self.axis, experts, started.padded_rows)
        expansion, counts_L = plan_expert_rows(local, experts)  # while the rows travel
        tokens_RD = expand(started.rows.wait(), expansion)
        keys_R = None if started.keys is None else expand(started.keys.wait(), expansion).squeeze(1)
        return DispatchedTokens(tokens_RD, counts_L, (started.route, expansion, local.choices.weights_C), keys_R)

    def start_combine(self, y_RD: Tensor, dispatched: DispatchedTokens) -> PendingRows:
        route, expansion, weights_C = dispatched.metadata
        return route.reverse().start(reduce(y_RD, expansion, weights_C), ends_layer=True)

    def finish_combine(self, started: PendingRows) -> Tensor:
        return started.wait()


def _tokens_of_each(x_TD: Tensor, axis: Axis) -> list[int]:
    """Returns the number of tokens of each rank (a synchronisation)."""
    own = torch.full((1,), len(x_TD), device=x_TD.device)
    tokens_N = stack_over(own, axis).flatten()
    with waiting_for_device():
        return host_read(tokens_N, "tokens of each rank", lambda: axis.size * [len(x_TD)])


def _local_choices(weights_and_experts: Tensor, axis: Axis, experts: int, padded_rows: int | None) -> LocalChoices:
    """Returns the choices of this rank's `experts` among those of all tokens. The host reads their number (a synchronisation)."""
    weights_GK, expert_GK = weights_and_experts.chunk(2, dim=1)
    expert_GK = expert_GK.detach().long() - axis.rank * experts
    local_GK = (expert_GK >= 0) & (expert_GK < experts)
    tokens, top_k = local_GK.shape
    most = min(top_k, experts)
    depths_K = (local_GK.sum(1, keepdim=True) > torch.arange(most, device=expert_GK.device)).sum(0)
    with waiting_for_device():
        depths = host_read(
            depths_K, "choices of own experts", lambda: assumed_depths(tokens, hot_rows(tokens * top_k), axis.size, most)
        )
    index_C = torch.nonzero_static(local_GK.flatten(), size=sum(depths)).flatten()
    nth_C = (local_GK.cumsum(1) - 1).flatten()[index_C]
    weights_C = weights_GK.flatten().index_select(0, index_C)
    choices = ExpertChoices(tokens, index_C // top_k, expert_GK.flatten()[index_C], weights_C, most, padded_rows)
    return LocalChoices(choices, nth_C, [rows for rows in depths if rows])
