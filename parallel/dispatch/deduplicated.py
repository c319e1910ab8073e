"""The deduplicated exchange: a token goes once to each rank that has any of its experts, and one row comes back.

Its local experts and their weights go along, so the destination weighs and sums before it answers, and the weights' gradient comes
back as a number for each choice. Of 8 experts of 128 on 8 ranks that is 5.3 rows each way instead of 8. Over two axes it is the
hierarchical exchange: first to each node, then inside of it.
"""

from typing import NamedTuple

from torch import Tensor

from ...moe.dispatch import Arrived
from ...moe.router import Routing
from ..mesh import Axis
from .choices import choices_of, plan_expansion
from .exchanging import ExchangingDispatcher
from .fan import Fan, add_up, copy_out
from .flights import Flight
from .hop import Hop, hop, hop_back, landed_back, landed_choices, landed_rows


class WayBack(NamedTuple):
    """Hops in the order in which they were made, and the last fan-out, to this rank's experts."""

    hops: list[Hop]
    fan: Fan
    weights_A: Tensor


class DeduplicatedDispatcher(ExchangingDispatcher):
    """Experts are numbered in the order of the first axis, then of the second, if there is one."""

    def __init__(self, experts: int, axes: list[Axis], chunks: int = 1) -> None:
        super().__init__(chunks)
        self.experts = experts
        self.axes = axes
        self.reach = [experts := experts // axis.size for axis in axes]
        """Experts behind each destination of a hop; in the end those of this rank."""

    def send(self, x_TD: Tensor, routing: Routing) -> Hop:
        choices = choices_of(routing, self.experts, self.experts // self.reach[-1])
        return hop(x_TD, choices, self.reach[0], self.axes[0])

    def receive(self, sent: Hop) -> Arrived:
        hops = [sent]
        for reach, axis in zip(self.reach[1:], self.axes[1:], strict=True):
            counted = landed_choices(hops[-1])
            hops.append(hop(landed_rows(hops[-1]), counted.choices, reach, axis))
        counted = landed_choices(hops[-1])
        fan, counts_L = plan_expansion(counted, self.reach[-1])  # while the rows travel
        tokens_RD = copy_out(landed_rows(hops[-1]), fan)
        return Arrived(tokens_RD, counts_L, WayBack(hops, fan, counted.choices.weights_C))

    def send_back(self, y_RD: Tensor, arrived: Arrived) -> tuple[Flight, Hop]:
        way_back: WayBack = arrived.way_back
        y = add_up(y_RD, way_back.fan, way_back.weights_A)
        for later in reversed(way_back.hops[1:]):
            y = landed_back(hop_back(y, later), later)
        return hop_back(y, way_back.hops[0]), way_back.hops[0]

    def receive_back(self, sent: tuple[Flight, Hop]) -> Tensor:
        return landed_back(*sent)
