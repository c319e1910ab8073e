"""The deduplicated exchange: a token goes once to each rank that has any of its experts, and one row comes back.

Its local experts and their weights go along, so the destination weighs and sums before it answers, and the weights' gradient comes
back as a number for each choice. Of 8 experts of 128 on 8 ranks that is 5.3 rows each way instead of 8. Over two axes it is the
hierarchical exchange: first to each node, then inside of it.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...moe.device import host_read
from ...moe.dispatch import DispatchedTokens
from ...moe.router import Routing
from ..mesh import Axis, Mesh
from ..progress import collective, waiting_for_device
from .async_collectives import Flight, RowExchange, depart, land
from .base import ExchangingDispatcher
from .expand import Counted, ExpertChoices, Fan, add_up, assumed_depths, choices_of, copy_out, plan_expansion, plan_fan

# One hop of a deduplicated exchange: a row goes once to each rank of an axis that leads to any of the experts it wants.
#
# With it go its choices: a weight, and which expert at the destination. On the way back there is one row for each that went,
# already weighted and summed. N ranks of the axis, P rows here, C choices, K the most choices of a row at one destination, D
# width, R rows that leave this rank, A choices that arrive at it.


class Hop(NamedTuple):
    """What is under way, or has landed, and how to go back."""

    fan: Fan
    way: RowExchange
    rows: Flight
    choices: Flight
    most: int
    deeper: list[int]
    padded_rows: int | None


class Sizes(NamedTuple):
    """Read on the host. [n][k] is how many rows with more than k choices go to, or come from, rank n."""

    sent: list[list[int]]
    came: list[list[int]]
    fan: list[int]
    """[k] is how many rows go to more than k ranks."""


def hop(x_PD: Tensor, choices: ExpertChoices, experts: int, axis: Axis) -> Hop:
    """Start to send the rows, and their choices; the destinations have `experts` experts each."""
    counts_PN = _count(choices, experts, axis.size)
    sizes = _exchange_sizes(counts_PN, len(choices.row_C), min(choices.most, experts), axis)
    fan = _fan(counts_PN, sizes)
    way = RowExchange([of_rank[0] for of_rank in sizes.sent], [of_rank[0] for of_rank in sizes.came], axis)
    rows = depart(copy_out(x_PD, fan), way)
    choices_way = RowExchange([sum(of_rank) for of_rank in sizes.sent], [sum(of_rank) for of_rank in sizes.came], axis)
    flight = depart(_pack(choices, counts_PN, sizes, experts), choices_way)
    deeper = [sum(of_ranks) for of_ranks in zip(*sizes.came, strict=True)]
    return Hop(fan, way, rows, flight, len(deeper), deeper, choices.padded_rows)


def landed_choices(hop: Hop) -> Counted:
    """The choices that came, of the destination's own experts."""
    weights_A, code_A = land(hop.choices).unbind(1)
    code_A = code_A.detach().long()
    nth_A, expert_A = code_A % hop.most, code_A // hop.most
    row_A = (nth_A == 0).cumsum(0) - 1
    choices = ExpertChoices(sum(hop.way.receive), row_A, expert_A, weights_A, hop.most, hop.padded_rows)
    return Counted(choices, nth_A, _trimmed(hop.deeper))


def landed_rows(hop: Hop) -> Tensor:
    """The rows that came."""
    return land(hop.rows)


def hop_back(y: Tensor, hop: Hop) -> Flight:
    """Start to send back a row for each that came."""
    return depart(y, hop.way.opposite())


def landed_back(flight: Flight, hop: Hop) -> Tensor:
    """(P, D): for each row the sum of what came back."""
    return add_up(land(flight), hop.fan)


def _count(choices: ExpertChoices, experts: int, ranks: int) -> Tensor:
    """(P, N): how many experts of each rank a row wants."""
    cell_C = choices.row_C * (ranks + 1) + choices.expert_C // experts  # dropped choices fall into an extra last column
    counts = torch.zeros(choices.rows * (ranks + 1), dtype=torch.int64, device=cell_C.device)
    return counts.scatter_add_(0, cell_C, torch.ones_like(cell_C)).view(choices.rows, ranks + 1)[:, :ranks]


def _exchange_sizes(counts_PN: Tensor, choices: int, most: int, axis: Axis) -> Sizes:
    """A small all-to-all, and the one synchronisation with the host."""
    rows, ranks = counts_PN.shape
    sent_NK = torch.stack([(counts_PN > k).sum(0) for k in range(most)], dim=1)
    came_NK = sent_NK
    if axis.group is not None:
        came_NK = torch.empty_like(sent_NK)
        with collective("all_to_all", axis):
            dist.all_to_all_single(came_NK, sent_NK, group=axis.group)
    pairs_P = (counts_PN > 0).sum(1)
    fan_N = (pairs_P.unsqueeze(1) > torch.arange(ranks, device=pairs_P.device)).sum(0)
    counted = torch.cat([sent_NK.flatten(), came_NK.flatten(), fan_N])
    with waiting_for_device():
        numbers = host_read(counted, "rows and choices of each rank", lambda: _assumed(rows, choices, ranks, most))
    of_ranks = [numbers[start : start + most] for start in range(0, 2 * ranks * most, most)]
    return Sizes(of_ranks[:ranks], of_ranks[ranks:], _trimmed(numbers[-ranks:]))


def _assumed(rows: int, choices: int, ranks: int, most: int) -> list[int]:
    """What a dry run reads as the numbers of `Sizes`: to each rank goes, and from it comes, the same."""
    depths = assumed_depths(rows, choices, ranks, most)
    return 2 * ranks * depths + [min(rows, max(0, ranks * depths[0] - k * rows)) for k in range(ranks)]


def _fan(counts_PN: Tensor, sizes: Sizes) -> Fan:
    """Copies in the order of (rank, row)."""
    goes_PN = counts_PN > 0
    copies = sum(sizes.fan)
    pair_R = torch.nonzero_static(goes_PN.T.flatten(), size=copies).flatten()
    rows = max(len(counts_PN), 1)
    row_R, rank_R = pair_R % rows, pair_R // rows
    nth_R = goes_PN.cumsum(1)[row_R, rank_R] - 1
    return plan_fan(row_R, nth_R, torch.arange(copies, device=row_R.device), len(counts_PN), sizes.fan, copies)


def _pack(choices: ExpertChoices, counts_PN: Tensor, sizes: Sizes, experts: int) -> Tensor:
    """(C, 2), in the order of (rank, row): the weight; and expert * K + n for the n-th of the row's choices there."""
    most = len(sizes.sent[0])
    assert experts * most <= 2**24, "fp32 does not hold so many codes"
    rank_C = choices.expert_C // experts
    order_C = rank_C.argsort(stable=True)[: sum(map(sum, sizes.sent))]
    rank_C, row_C, expert_C = rank_C[order_C], choices.row_C[order_C], choices.expert_C[order_C]
    ends_NP = counts_PN.T.flatten().cumsum(0).view(counts_PN.T.shape)
    nth_C = torch.arange(len(order_C), device=order_C.device) - (ends_NP - counts_PN.T)[rank_C, row_C]
    code_C = (expert_C - rank_C * experts) * most + nth_C
    weights_C = choices.weights_C.index_select(0, order_C)
    return torch.stack([weights_C, code_C.to(weights_C.dtype)], dim=1)


def _trimmed(sizes: list[int]) -> list[int]:
    """Without the zeros at the end."""
    return [size for size in sizes if size]  # they never grow


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

    def receive(self, sent: Hop) -> DispatchedTokens:
        hops = [sent]
        for reach, axis in zip(self.reach[1:], self.axes[1:], strict=True):
            counted = landed_choices(hops[-1])
            hops.append(hop(landed_rows(hops[-1]), counted.choices, reach, axis))
        counted = landed_choices(hops[-1])
        fan, counts_L = plan_expansion(counted, self.reach[-1])  # while the rows travel
        tokens_RD = copy_out(landed_rows(hops[-1]), fan)
        return DispatchedTokens(tokens_RD, counts_L, WayBack(hops, fan, counted.choices.weights_C))

    def send_back(self, y_RD: Tensor, arrived: DispatchedTokens) -> tuple[Flight, Hop]:
        metadata: WayBack = arrived.metadata
        y = add_up(y_RD, metadata.fan, metadata.weights_A)
        for later in reversed(metadata.hops[1:]):
            y = landed_back(hop_back(y, later), later)
        return hop_back(y, metadata.hops[0]), metadata.hops[0]

    def receive_back(self, sent: tuple[Flight, Hop]) -> Tensor:
        return landed_back(*sent)


# The hierarchical exchange: a token crosses to each node with any of its experts once, then goes to the ranks inside that node.
#
# Between nodes a rank talks only to those with its own place in theirs (DeepSeek-V3, section 3.2.2). Both hops are
# deduplicated, so with group-limited routing the slow network carries at most `top_groups` rows of a token when the nodes are
# the groups.


def node_axes(mesh: Mesh, node_ranks: int) -> list[Axis]:
    """The expert axis as nodes x ranks of a node; inside of one node it is one axis."""
    experts = mesh.sizes["expert"]
    inside = min(node_ranks, experts)
    assert experts % inside == 0
    if inside in (1, experts):
        return [mesh.axis("expert")]
    return [mesh.axis_of(ranks) for ranks in _groups(mesh.world, experts, inside)]


def _groups(world: int, experts: int, inside: int) -> list[list[list[int]]]:
    """The groups of ranks between nodes, and those inside of them."""
    starts = range(0, world, experts)
    between = [list(range(start + place, start + experts, inside)) for start in starts for place in range(inside)]
    return [between, [list(range(start, start + inside)) for start in range(0, world, inside)]]
