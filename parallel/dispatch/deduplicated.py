"""The deduplicated exchange: a token goes once to each rank that has any of its experts, and one row comes back.

Its choices of local experts and their weights go along, so the destination returns a weighted sum, and the gradient of the weights
comes back as one number for each choice. With 8 of 128 experts on 8 ranks that is 5.3 rows each way instead of 8.

Over two axes it is the hierarchical exchange: a token goes first to each node with any of its experts, once, and then to the ranks
inside that node. Between nodes a rank exchanges rows only with the rank of the same index in the other nodes (DeepSeek-V3,
section 3.2.2). If the nodes are the groups of group-limited routing, at most `top_groups` rows of a token cross the slow network.

N ranks of an axis, P rows here, C choices, K the most choices of a row at one destination, D width, R rows that leave this rank, A
choices that it receives.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...moe.device import host_read, hot_rows
from ...moe.dispatch import DispatchedTokens
from ...moe.router import Routing
from ..layout import node_digits
from ..mesh import Axis, Mesh
from ..progress import waiting_for_device
from .async_collectives import AllToAll, PendingRows
from .base import ExpertParallelDispatcher
from .expand import (
    Expansion,
    ExpertChoices,
    LocalChoices,
    assumed_depths,
    choices_of,
    expand,
    plan_expansion,
    plan_expert_rows,
    reduce,
)


class Hop(NamedTuple):
    """The deduplicated exchange over one axis: rows and choices under way, and what the way back needs."""

    expansion: Expansion
    route: AllToAll
    rows: PendingRows
    choices: PendingRows
    depths: list[int]
    """[k] is how many received rows have more than k choices."""
    padded_rows: int | None
    keys: PendingRows | None
    """The random keys of the rows, (R, 1); None without dropout inside of the experts."""


class Sizes(NamedTuple):
    """Numbers read on the host. [n][k] is how many rows with more than k choices go to, or come from, rank n."""

    sent: list[list[int]]
    received: list[list[int]]
    depths: list[int]
    """[k] is how many rows go to more than k ranks."""


def start_hop(
    x_PD: Tensor, keys_P1: Tensor | None, choices: ExpertChoices, experts: int, axis: Axis, last: bool, narrow: bool
) -> Hop:
    """Starts to send the rows, their keys and their choices over `axis`, whose destinations have `experts` experts each.

    `last`: the destinations are the ranks of the experts. `narrow`: the rows travel in e4m3.
    """
    counts_PN = _count(choices, experts, axis.size)
    sizes = _exchange_sizes(counts_PN, len(choices.row_C), min(choices.top_k, experts), axis, last)
    expansion = _plan(counts_PN, sizes)
    route = AllToAll([of_rank[0] for of_rank in sizes.sent], [of_rank[0] for of_rank in sizes.received], axis)
    rows = route.start(expand(x_PD, expansion), narrow=narrow)
    choices_route = AllToAll([sum(of_rank) for of_rank in sizes.sent], [sum(of_rank) for of_rank in sizes.received], axis)
    packed = choices_route.start(_pack(choices, counts_PN, sizes, experts))
    depths = [sum(of_ranks) for of_ranks in zip(*sizes.received, strict=True)]
    keys = None if keys_P1 is None else route.start(expand(keys_P1, expansion))
    return Hop(expansion, route, rows, packed, depths, choices.padded_rows, keys)


def wait_for_choices(hop: Hop) -> LocalChoices:
    """Returns the received choices, which are of the destination's own experts."""
    top_k = len(hop.depths)
    weights_A, code_A = hop.choices.wait().unbind(1)
    code_A = code_A.detach().long()
    nth_A, expert_A = code_A % top_k, code_A // top_k
    row_A = (nth_A == 0).cumsum(0) - 1
    choices = ExpertChoices(sum(hop.route.receive), row_A, expert_A, weights_A, top_k, hop.padded_rows)
    return LocalChoices(choices, nth_A, _without_zeros(hop.depths))


def _count(choices: ExpertChoices, experts: int, ranks: int) -> Tensor:
    """(P, N): how many experts of each rank a row chose."""
    cell_C = choices.row_C * (ranks + 1) + choices.expert_C // experts  # dropped choices fall into an extra last column
    counts = torch.zeros(choices.rows * (ranks + 1), dtype=torch.int64, device=cell_C.device)
    return counts.scatter_add_(0, cell_C, torch.ones_like(cell_C)).view(choices.rows, ranks + 1)[:, :ranks]


def _exchange_sizes(counts_PN: Tensor, choices: int, top_k: int, axis: Axis, last: bool) -> Sizes:
    """Exchanges the numbers of rows in a small all-to-all, and reads them on the host (a synchronisation)."""
    rows, ranks = counts_PN.shape
    sent_NK = torch.stack([(counts_PN > k).sum(0) for k in range(top_k)], dim=1)
    received_NK = AllToAll([1] * ranks, [1] * ranks, axis).start(sent_NK).wait()
    ranks_P = (counts_PN > 0).sum(1)
    depths_N = (ranks_P.unsqueeze(1) > torch.arange(ranks, device=ranks_P.device)).sum(0)
    counted = torch.cat([sent_NK.flatten(), received_NK.flatten(), depths_N])
    with waiting_for_device():
        numbers = host_read(counted, "rows and choices of each rank", lambda: _assumed(rows, choices, ranks, top_k, last))
    of_ranks = [numbers[start : start + top_k] for start in range(0, 2 * ranks * top_k, top_k)]
    return Sizes(of_ranks[:ranks], of_ranks[ranks:], _without_zeros(numbers[-ranks:]))


def _assumed(rows: int, choices: int, ranks: int, top_k: int, last: bool) -> list[int]:
    """Returns the numbers of `Sizes` in a dry run: every rank sends the same to, and receives the same from, each rank.

    The rank of hot experts receives more in the last hop.
    """
    depths = assumed_depths(rows, choices, ranks, top_k)
    received = assumed_depths(rows, hot_rows(choices), ranks, top_k) if last else depths
    return ranks * depths + ranks * received + [min(rows, max(0, ranks * depths[0] - k * rows)) for k in range(ranks)]


def _plan(counts_PN: Tensor, sizes: Sizes) -> Expansion:
    """Plans a copy of each row for each of its ranks, in the order of (rank, row)."""
    goes_PN = counts_PN > 0
    copies = sum(sizes.depths)
    pair_R = torch.nonzero_static(goes_PN.T.flatten(), size=copies).flatten()
    rows = max(len(counts_PN), 1)
    row_R, rank_R = pair_R % rows, pair_R // rows
    nth_R = goes_PN.cumsum(1)[row_R, rank_R] - 1
    return plan_expansion(row_R, nth_R, torch.arange(copies, device=row_R.device), len(counts_PN), sizes.depths, copies)


def _pack(choices: ExpertChoices, counts_PN: Tensor, sizes: Sizes, experts: int) -> Tensor:
    """(C, 2), in the order of (rank, row): the weight, and expert * K + n for the n-th of the row's choices at that rank."""
    top_k = len(sizes.sent[0])
    assert experts * top_k <= 2**24, "fp32 does not hold so many codes"
    rank_C = choices.expert_C // experts
    order_C = rank_C.argsort(stable=True)[: sum(map(sum, sizes.sent))]
    rank_C, row_C, expert_C = rank_C[order_C], choices.row_C[order_C], choices.expert_C[order_C]
    ends_NP = counts_PN.T.flatten().cumsum(0).view(counts_PN.T.shape)
    nth_C = torch.arange(len(order_C), device=order_C.device) - (ends_NP - counts_PN.T)[rank_C, row_C]
    code_C = (expert_C - rank_C * experts) * top_k + nth_C
    weights_C = choices.weights_C.index_select(0, order_C)
    return torch.stack([weights_C, code_C.to(weights_C.dtype)], dim=1)


def _without_zeros(depths: list[int]) -> list[int]:
    """Drops the zeros at the end; depths never increase."""
    return [rows for rows in depths if rows]


class DeduplicatedDispatcher(ExpertParallelDispatcher):
    """One hop over each of the axes. Experts are numbered in the order of the first axis, then of the second, if there is one."""

    def __init__(self, experts: int, axes: list[Axis], chunks: int = 1) -> None:
        super().__init__(chunks)
        self.experts = experts
        self.axes = axes
        self.reach: list[int] = []
        """Experts behind each destination of a hop; after the last hop those of this rank."""
        for axis in axes:
            experts //= axis.size
            self.reach.append(experts)

    def start_dispatch(self, x_TD: Tensor, routing: Routing) -> Hop:
        choices = choices_of(routing, self.experts, self.experts // self.reach[-1])
        keys_T1 = None if routing.keys_T is None else routing.keys_T.unsqueeze(1)
        return start_hop(x_TD, keys_T1, choices, self.reach[0], self.axes[0], len(self.axes) == 1, self.narrow)

    def finish_dispatch(self, started: Hop) -> DispatchedTokens:
        hops = [started]
        for reach, axis in zip(self.reach[1:], self.axes[1:], strict=True):
            local = wait_for_choices(hops[-1])
            keys_P1 = None if hops[-1].keys is None else hops[-1].keys.wait()
            rows_PD = hops[-1].rows.wait()
            hops.append(start_hop(rows_PD, keys_P1, local.choices, reach, axis, last=True, narrow=self.narrow))
        local = wait_for_choices(hops[-1])
        expansion, counts_L = plan_expert_rows(local, self.reach[-1])  # while the rows travel
        tokens_RD = expand(hops[-1].rows.wait(), expansion)
        keys_R = None if hops[-1].keys is None else expand(hops[-1].keys.wait(), expansion).squeeze(1)
        return DispatchedTokens(tokens_RD, counts_L, (hops, expansion, local.choices.weights_C), keys_R)

    def start_combine(self, y_RD: Tensor, dispatched: DispatchedTokens) -> tuple[PendingRows, Hop]:
        hops, expansion, weights_A = dispatched.metadata
        y = reduce(y_RD, expansion, weights_A)
        for hop in reversed(hops[1:]):
            y = reduce(hop.route.reverse().start(y).wait(), hop.expansion)
        return hops[0].route.reverse().start(y, ends_layer=True), hops[0]

    def finish_combine(self, started: tuple[PendingRows, Hop]) -> Tensor:
        rows, hop = started
        return reduce(rows.wait(), hop.expansion)


def node_axes(mesh: Mesh, node_ranks: int) -> list[Axis]:
    """Returns the expert axis as [nodes, ranks of a node]; as one axis if it lies inside a node or nodes have one rank of it."""
    return [mesh.strided(dim) for dim in node_digits(mesh.sizes, node_ranks)]
