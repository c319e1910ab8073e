"""Ranks with slices of sequences drop the same choices, and count the same, as one device with all tokens."""

from typing import Any

import pytest
import torch
from tokenyard.moe.capacity import LocalScope, count_choices, keep_best, keep_earliest
from tokenyard.moe.config import Scope
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import build_mesh
from tokenyard.parallel.scopes import DistributedScope, scope_sum
from torch import Tensor

EXPERTS, TOP_K, SEQUENCES, LENGTH = 4, 2, 8, 12
LAYOUTS = pytest.mark.parametrize(("world", "tensor"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])


@LAYOUTS
@pytest.mark.parametrize("by_priority", [False, True])
@pytest.mark.parametrize("scope", Scope)
def test_ranks_drop_what_one_device_drops(ranks: Any, scope: Scope, by_priority: bool, world: int, tensor: int) -> None:
    rows = {Scope.sequence: 4, Scope.batch: 30, Scope.rank: 6}[scope]
    for rank, kept_BSK in enumerate(ranks(world, keep_on_rank, rows, scope, by_priority, tensor)):
        if scope is Scope.rank:
            expected_BSK = kept(part_of_choices(rank, world, tensor), rows, scope, by_priority, LocalScope())
        else:
            expected_BSK = part_of(kept(choices(), rows, scope, by_priority, LocalScope()), rank, world, tensor)
        assert torch.equal(kept_BSK, expected_BSK)
        assert 0 < kept_BSK.sum() < kept_BSK.numel()


def keep_on_rank(rows: int, scope: Scope, by_priority: bool, tensor: int) -> Tensor:
    mesh = build_mesh(ParallelConfig(tensor=tensor))
    scopes, mine = DistributedScope(mesh), part_of_choices(mesh.rank, mesh.world, tensor)
    tokens = {Scope.sequence: LENGTH, Scope.batch: SEQUENCES * LENGTH, Scope.rank: SEQUENCES * LENGTH // mesh.world}
    assert scopes.tokens(len(mine[0]), mine[0].shape[1], scope) == tokens[scope]
    return kept(mine, rows, scope, by_priority, scopes)


def kept(choices: tuple[Tensor, Tensor, Tensor], rows: int, scope: Scope, by_priority: bool, scopes: LocalScope) -> Tensor:
    experts_BSK, wanted_BSK, priority_BSE = choices
    if by_priority:
        return keep_best(experts_BSK, wanted_BSK, priority_BSE, rows, scope, scopes)
    return keep_earliest(experts_BSK, wanted_BSK, rows, EXPERTS, scope, scopes)


@LAYOUTS
def test_sums_over_a_scope(ranks: Any, world: int, tensor: int) -> None:
    experts_BSK, wanted_BSK, _ = choices()
    counts_LBE = torch.stack([count_choices(experts_BSK, wanted_BSK, EXPERTS), count_choices(experts_BSK, None, EXPERTS)])
    for rank, (sums, totals) in enumerate(ranks(world, sums_on_rank, tensor)):
        sequences = counts_LBE.chunk(world // tensor, 1)[rank // tensor]
        mine = part_of_choices(rank, world, tensor)
        assert torch.equal(sums[Scope.sequence], sequences) and torch.equal(totals[Scope.sequence], sequences[0])
        assert torch.equal(sums[Scope.batch], counts_LBE.sum(1)) and torch.equal(totals[Scope.batch], counts_LBE[0].sum(0, True))
        assert torch.equal(sums[Scope.rank][0], count_choices(mine[0], mine[1], EXPERTS).sum(0))
        assert all(counts.dtype == torch.int64 for counts in sums.values())


def sums_on_rank(tensor: int) -> tuple[dict[Scope, Tensor], dict[Scope, Tensor]]:
    mesh = build_mesh(ParallelConfig(tensor=tensor))
    experts, wanted, _ = part_of_choices(mesh.rank, mesh.world, tensor)
    counts_LBE = torch.stack([count_choices(experts, wanted, EXPERTS), count_choices(experts, None, EXPERTS)])
    before = counts_LBE.clone()
    sums = {scope: scope_sum(counts_LBE, scope, mesh) for scope in Scope}
    totals = {scope: DistributedScope(mesh).total(counts_LBE[0], scope) for scope in Scope}
    assert torch.equal(counts_LBE, before), "the rank's own counts stay"
    return sums, totals


def part_of_choices(rank: int, world: int, tensor: int) -> tuple[Tensor, Tensor, Tensor]:
    experts_BSK, wanted_BSK, priority_BSE = (part_of(part, rank, world, tensor) for part in choices())
    return experts_BSK, wanted_BSK, priority_BSE


def part_of(tokens_BS: Tensor, rank: int, world: int, tensor: int) -> Tensor:
    """Returns the part of a rank: data ranks have runs of sequences, tensor ranks slices of these."""
    return tokens_BS.chunk(world // tensor)[rank // tensor].chunk(tensor, 1)[rank % tensor]


def choices() -> tuple[Tensor, Tensor, Tensor]:
    """Returns experts (the first are chosen more often), a mask of wanted choices, and priorities with many ties."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.rand(SEQUENCES, LENGTH, EXPERTS, generator=generator) + torch.tensor([0.6, 0.3, 0.0, 0.0])
    valid_BS = torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.8
    priority_BSE = torch.randint(4, (SEQUENCES, LENGTH, EXPERTS), generator=generator).double()
    experts_BSK = noise.topk(TOP_K).indices
    return experts_BSK, valid_BS[..., None].expand_as(experts_BSK), priority_BSE
