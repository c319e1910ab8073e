"""The exchange by all-gather and reduce-scatter: every rank gets all tokens of the group and computes its own experts' part.

Nothing is sorted for the way and no counts are exchanged; it sends N - 1 rows of a token each way, which is least when a token's
experts are on most of the N ranks anyway: small groups, large K.
T tokens here, G tokens of the whole group, K choices per token, E experts, L experts of a rank, C choices of this rank's experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...moe.device import host_read
from ...moe.dispatch import DispatchedTokens, chosen
from ...moe.router import Routing
from ..collectives import stack_over
from ..mesh import Axis
from ..progress import waiting_for_device
from .async_collectives import Flight, Gather, depart, land
from .base import ExchangingDispatcher
from .expand import Counted, ExpertChoices, Fan, add_up, assumed_depths, copy_out, plan_expansion


class Sent(NamedTuple):
    way: Gather
    rows: Flight
    choices: Flight
    padded_rows: int | None


class WayBack(NamedTuple):
    way: Gather
    fan: Fan
    weights_C: Tensor


class GatherDispatcher(ExchangingDispatcher):
    """Each rank adds up what its experts give for any token of the group; the sums over the ranks are scattered."""

    def __init__(self, experts: int, axis: Axis, chunks: int = 1) -> None:
        super().__init__(chunks)
        self.experts = experts
        self.axis = axis

    def send(self, x_TD: Tensor, routing: Routing) -> Sent:
        way = Gather(_tokens_of_each(x_TD, self.axis), self.axis)
        padded = None if routing.padded_rows is None else routing.padded_rows * self.axis.size
        return Sent(way, depart(x_TD, way), depart(_pack(routing, self.experts), way), padded)

    def receive(self, sent: Sent) -> DispatchedTokens:
        held = self.experts // self.axis.size
        counted = _choices_of_mine(land(sent.choices), self.axis, held, sent.padded_rows)
        fan, counts_L = plan_expansion(counted, held)  # while the rows travel
        tokens_RD = copy_out(land(sent.rows), fan)
        return DispatchedTokens(tokens_RD, counts_L, WayBack(sent.way, fan, counted.choices.weights_C))

    def send_back(self, y_RD: Tensor, arrived: DispatchedTokens) -> Flight:
        metadata: WayBack = arrived.metadata
        return depart(add_up(y_RD, metadata.fan, metadata.weights_C), metadata.way.opposite())

    def receive_back(self, sent: Flight) -> Tensor:
        return land(sent)


def _pack(routing: Routing, experts: int) -> Tensor:
    """(T, 2 K): weights, then expert ids, E for what was dropped."""
    return torch.cat([routing.weights_TK, chosen(routing, experts).to(routing.weights_TK.dtype)], dim=1)


def _tokens_of_each(x_TD: Tensor, axis: Axis) -> list[int]:
    """How many tokens each rank has (a synchronisation)."""
    own = torch.full((1,), len(x_TD), device=x_TD.device)
    tokens_N = stack_over(own, axis).flatten()
    with waiting_for_device():
        return host_read(tokens_N, "tokens of each rank", lambda: axis.size * [len(x_TD)])


def _choices_of_mine(packed: Tensor, axis: Axis, held: int, padded_rows: int | None) -> Counted:
    """Of all tokens' choices those of this rank's `held` experts. Their number is read on the host (a synchronisation)."""
    weights_GK, expert_GK = packed.chunk(2, dim=1)
    expert_GK = expert_GK.detach().long() - axis.rank * held
    mine_GK = (expert_GK >= 0) & (expert_GK < held)
    tokens, top_k = mine_GK.shape
    most = min(top_k, held)
    deeper_K = (mine_GK.sum(1, keepdim=True) > torch.arange(most, device=packed.device)).sum(0)
    with waiting_for_device():
        deeper = host_read(deeper_K, "choices of own experts", lambda: assumed_depths(tokens, tokens * top_k, axis.size, most))
    place_C = torch.nonzero_static(mine_GK.flatten(), size=sum(deeper)).flatten()
    nth_C = (mine_GK.cumsum(1) - 1).flatten()[place_C]
    weights_C = weights_GK.flatten().index_select(0, place_C)
    choices = ExpertChoices(tokens, place_C // top_k, expert_GK.flatten()[place_C], weights_C, most, padded_rows)
    return Counted(choices, nth_C, [rows for rows in deeper if rows])
