"""Ranks decide over slices of sequences as one device decides over all tokens: who is dropped, how often experts are chosen."""

from typing import Any

import pytest
import torch
from tokenyard.moe.capacity import OneDevice, Tokens, keep
from tokenyard.moe.config import MoEConfig, Scope
from tokenyard.moe.router import count_choices
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import build_mesh
from tokenyard.parallel.scopes import RankSurroundings, scope_counts
from torch import Tensor

EXPERTS, TOP_K, SEQUENCES, LENGTH = 4, 2, 8, 12
LAYOUTS = pytest.mark.parametrize(("world", "tensor"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])


@LAYOUTS
@pytest.mark.parametrize("factor", [0.5, 1.1])
@pytest.mark.parametrize("scope", Scope)
def test_ranks_drop_what_one_device_drops(ranks: Any, scope: Scope, factor: float, world: int, tensor: int) -> None:
    experts_BSK, valid_BS = choices()
    config = MoEConfig(experts=EXPERTS, top_k=TOP_K, capacity_factor=factor, capacity_scope=scope)
    for rank, kept_BSK in enumerate(ranks(world, keep_on_rank, experts_BSK, valid_BS, config, tensor)):
        if scope is Scope.rank:
            mine = (part_of(experts_BSK, rank, world, tensor), part_of(valid_BS, rank, world, tensor))
            expected_BSK = keep(tokens_of(*mine), config, OneDevice())
        else:
            expected_BSK = part_of(keep(tokens_of(experts_BSK, valid_BS), config, OneDevice()), rank, world, tensor)
        assert torch.equal(kept_BSK, expected_BSK)
        assert 0 < kept_BSK.sum() < kept_BSK.numel()


def keep_on_rank(experts_BSK: Tensor, valid_BS: Tensor, config: MoEConfig, tensor: int) -> Tensor:
    mesh = build_mesh(ParallelConfig(tensor=tensor))
    mine = (part_of(part, mesh.rank, mesh.world, tensor) for part in (experts_BSK, valid_BS))
    return keep(tokens_of(*mine), config, RankSurroundings(mesh))


@LAYOUTS
def test_counts_of_a_scope(ranks: Any, world: int, tensor: int) -> None:
    experts_BSK, valid_BS = choices()
    counts_LBE = torch.stack([count_choices(experts_BSK, valid_BS, EXPERTS), count_choices(experts_BSK, None, EXPERTS)])
    for rank, found in enumerate(ranks(world, counts_on_rank, experts_BSK, valid_BS, tensor)):
        sequences = counts_LBE.chunk(world // tensor, 1)[rank // tensor]
        assert torch.equal(found[Scope.sequence], sequences)
        assert torch.equal(found[Scope.batch], counts_LBE.sum(1))
        mine = (part_of(experts_BSK, rank, world, tensor), part_of(valid_BS, rank, world, tensor))
        assert torch.equal(found[Scope.rank][0], count_choices(*mine, EXPERTS).sum(0))
        assert all(counts.dtype == torch.int64 for counts in found.values())


def counts_on_rank(experts_BSK: Tensor, valid_BS: Tensor, tensor: int) -> dict[Scope, Tensor]:
    mesh = build_mesh(ParallelConfig(tensor=tensor))
    experts, valid = (part_of(part, mesh.rank, mesh.world, tensor) for part in (experts_BSK, valid_BS))
    counts_LBE = torch.stack([count_choices(experts, valid, EXPERTS), count_choices(experts, None, EXPERTS)])
    before = counts_LBE.clone()
    found = {scope: scope_counts(counts_LBE, scope, mesh) for scope in Scope}
    assert torch.equal(counts_LBE, before), "the rank's own counts stay"
    return found


def part_of(tokens_BS: Tensor, rank: int, world: int, tensor: int) -> Tensor:
    """Data ranks have runs of sequences, tensor ranks slices of them."""
    return tokens_BS.chunk(world // tensor)[rank // tensor].chunk(tensor, 1)[rank % tensor]


def tokens_of(experts_BSK: Tensor, valid_BS: Tensor) -> Tokens:
    return Tokens(experts_BSK, valid_BS, count_choices(experts_BSK, valid_BS, EXPERTS))


def choices() -> tuple[Tensor, Tensor]:
    """Uneven: the first experts are chosen more often."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.rand(SEQUENCES, LENGTH, EXPERTS, generator=generator) + torch.tensor([0.6, 0.3, 0.0, 0.0])
    return noise.topk(TOP_K).indices, torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.8
