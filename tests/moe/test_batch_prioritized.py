"""Batch-prioritized routing against the loop of its paper (V-MoE, Riquelme et al. 2021, algorithm 2)."""

import pytest
import torch
from tokenyard.moe.capacity import LocalScope, keep_by_priority, keep_earliest
from tokenyard.moe.config import CapacityConfig, DropPolicy, MoEConfig, RouterConfig, Scope, Selection
from tokenyard.moe.router import Router
from tokenyard.moe.token_info import BatchPosition, Purpose, TokenInfo, build_token_info, layer_keys, random_uniform
from torch import Tensor

EXPERTS, SEQUENCES, LENGTH, BATCHES = 6, 3, 10, 40


def algorithm_2(scores_TE: Tensor, wanted_T: list[bool], top_k: int, rows: int) -> Tensor:
    """Booleans (T, K). By their largest score, all tokens place their first choices, then all their second ones, and so on."""
    choices = [sorted(range(EXPERTS), key=lambda e, row=row: -row[e])[:top_k] for row in scores_TE.tolist()]
    order = sorted(range(len(scores_TE)), key=lambda t: -max(scores_TE[t].tolist()))
    taken, kept_TK = [0] * EXPERTS, torch.zeros(len(scores_TE), top_k, dtype=torch.bool)
    for k in range(top_k):
        for token in order:
            expert = choices[token][k]
            if wanted_T[token] and taken[expert] < rows:
                kept_TK[token, k] = True
                taken[expert] += 1
    return kept_TK


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("scope", [Scope.sequence, Scope.batch])
def test_keeps_what_the_loop_of_the_paper_keeps(scope: Scope, top_k: int, masked: bool) -> None:
    config = MoEConfig(EXPERTS, top_k, capacity=CapacityConfig(factor=0.5, scope=scope, policy=DropPolicy.priority))
    parts = SEQUENCES if scope is Scope.sequence else 1
    differ = 0
    for batch in range(BATCHES):
        generator = torch.Generator().manual_seed(batch)
        bias = torch.tensor([1.0, 0.5, 0.0, 0.0, 0.0, 0.0])
        logits_BSE = torch.randn(SEQUENCES, LENGTH, EXPERTS, dtype=torch.float64, generator=generator) + bias
        valid_BS = torch.rand(SEQUENCES, LENGTH, generator=generator) < (0.7 if masked else 2.0)
        routing = router_of(config)(logits_BSE, TokenInfo(valid_BS))
        scores = logits_BSE.softmax(-1).view(parts, -1, EXPERTS)
        rows = -(-scores.shape[1] * top_k // (2 * EXPERTS))
        valid = valid_BS.view(parts, -1).tolist()
        expected = [algorithm_2(part, wanted, top_k, rows) for part, wanted in zip(scores, valid, strict=True)]
        assert routing.kept_TK is not None and torch.equal(routing.kept_TK, torch.cat(expected)), f"batch {batch}"
        wanted_BSK = valid_BS.unsqueeze(-1).expand(-1, -1, top_k)
        assert routing.stats.dropped == wanted_BSK.sum() - torch.cat(expected).sum() > 0
        by_position = keep_earliest(routing.experts_TK.view_as(wanted_BSK), wanted_BSK, rows, EXPERTS, scope, LocalScope())
        differ += int((by_position.flatten(0, 1) != routing.kept_TK).sum())
    assert differ > BATCHES


def test_equal_priorities_place_earlier_tokens_first() -> None:
    experts_BSK = torch.rand(SEQUENCES, LENGTH, EXPERTS, generator=torch.Generator().manual_seed(0)).topk(3).indices
    wanted_BSK, even_BS = torch.ones_like(experts_BSK, dtype=torch.bool), torch.full((SEQUENCES, LENGTH), 0.5)
    for scope in Scope:
        by_position = keep_earliest(experts_BSK, wanted_BSK, 3, EXPERTS, scope, LocalScope(), firsts_first=True)
        assert torch.equal(keep_by_priority(experts_BSK, wanted_BSK, even_BS, 3, EXPERTS, scope, LocalScope()), by_position)


def test_gshard_draws_its_second_experts_with_priorities_too() -> None:
    limits = CapacityConfig(factor=0.8, policy=DropPolicy.priority)
    config = MoEConfig(EXPERTS, 2, router=RouterConfig(selection=Selection.gshard), capacity=limits)
    logits_BSE = torch.randn(1, 64, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    router, tokens = router_of(config), build_token_info(torch.zeros(1, 64, dtype=torch.int64), None, BatchPosition())
    routing = router(logits_BSE, tokens)
    drawn_T = random_uniform(layer_keys(logits_BSE, tokens), 1, Purpose.second_expert).flatten() < 2 * routing.weights_TK[:, 1]
    placed_TK = algorithm_2(logits_BSE[0].softmax(-1), [True] * 64, 2, 18)
    placed_TK[:, 1] &= drawn_T
    assert torch.equal(routing.kept_TK, placed_TK)


def router_of(config: MoEConfig) -> Router:
    """A router whose input are the logits."""
    router = Router(EXPERTS, config, torch.float64)
    torch.nn.init.eye_(router.get_parameter("weight"))
    return router
