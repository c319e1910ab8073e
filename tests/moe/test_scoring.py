"""The experts that each selection chooses; test_expert_choice.py has expert choice."""

import math

import pytest
import torch
from tokenyard.moe.capacity import LocalScope, count_choices
from tokenyard.moe.config import BalanceConfig, MoEConfig, RouterConfig, Scope, Selection
from tokenyard.moe.device import dry_run
from tokenyard.moe.router import Router
from tokenyard.moe.scoring import NoisyLogits, choose_experts, hash_scores, sample_second_expert, selection_probability, top_k_ids
from tokenyard.moe.token_info import BatchPosition, TokenInfo, fold_in, token_keys

EXPERTS, WIDTH = 8, 16


def test_best_is_top_k_and_takes_the_first_of_equals() -> None:
    torch.manual_seed(0)
    scores = torch.rand(3, 50, 9)
    assert torch.equal(top_k_ids(scores, 4), scores.topk(4).indices)
    assert torch.equal(top_k_ids(torch.zeros(2, 300), 5), torch.arange(5).expand(2, 5))
    assert top_k_ids(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 4).tolist() == [1, 3, 2, 4]


@pytest.mark.parametrize("columns", [8, 9, 128, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_best_takes_the_same_on_cuda(columns: int, dtype: torch.dtype) -> None:
    """One sort equals K maxima: for random scores, ties, -inf, NaN and equal scores, up to the number of scores above -inf."""
    torch.manual_seed(0)
    scores = torch.randn(2, 50, columns, dtype=dtype)
    few = scores.masked_fill(torch.rand_like(scores) < 0.5, -torch.inf)
    few[..., :8] = scores[..., :8]
    strange = scores.masked_fill(torch.rand_like(scores) < 0.1, torch.nan)
    cases = [(scores, columns), ((4 * scores).round(), columns), (torch.zeros_like(scores), columns), (few, 8), (strange, columns)]
    for ranked_BSE, top_k in cases:
        for taken in {1, 2, 8, top_k}:
            with dry_run("cuda"):
                found = top_k_ids(ranked_BSE, taken)
            assert torch.equal(found, top_k_ids(ranked_BSE, taken)) and found.is_contiguous()


def test_hash_is_balanced_fixed_and_another_in_each_layer() -> None:
    ids_BS = torch.arange(EXPERTS * 100).view(4, -1)
    scores = [hash_scores(TokenInfo(ids_BS=ids_BS, layer=layer), EXPERTS, 2, torch.float32).flatten(0, 1) for layer in (0, 1)]
    for scores_TE in scores:
        assert (scores_TE.sum(1) == 2).all()
        assert (scores_TE.unflatten(0, (100, EXPERTS)).sum(1) == 2).all(), "each run of ids meets each expert equally often"
        assert scores_TE.unflatten(0, (100, EXPERTS)).flatten(1).unique(dim=0).shape[0] > 95, "runs differ"
    assert 0.2 < (scores[0] * scores[1]).sum() / scores[0].sum() < 0.3, "by chance a layer shares K / E with another"
    again = hash_scores(TokenInfo(ids_BS=ids_BS.flip(1)), EXPERTS, 2, torch.float32)
    assert torch.equal(again.flip(1).flatten(0, 1), scores[0]), "the id alone decides"


def test_hash_weighs_its_experts_alike() -> None:
    for top_k, normalised, weight in ((1, True, 1.0), (2, True, 0.5), (2, False, 1.0)):
        router = Router(
            WIDTH,
            MoEConfig(
                experts=EXPERTS, top_k=top_k, router=RouterConfig(selection=Selection.hash, normalize_top_k=normalised, scale=3.0)
            ),
            torch.float32,
        )
        routing = router(torch.randn(1, 5, WIDTH), TokenInfo(ids_BS=torch.arange(5).unsqueeze(0)))
        torch.testing.assert_close(routing.weights_TK, torch.full((5, top_k), 3.0 * weight))


@pytest.mark.parametrize("scope", [Scope.sequence, Scope.batch])
def test_sinkhorn_evens_the_load_of_its_scope(scope: Scope) -> None:
    torch.manual_seed(0)
    logits_BSE, valid_BS = torch.randn(2, 400, EXPERTS) + 2 * torch.arange(EXPERTS) / EXPERTS, torch.rand(2, 400) < 0.9
    even, uneven = (loads_of(sinkhorn(logits_BSE, valid_BS, scope, training), valid_BS, scope) for training in (True, False))
    assert (even.amax(1) < 1.3 * even.mean(1)).all() and (even.amin(1) > 0.7 * even.mean(1)).all()
    assert (uneven.amax(1) > 2 * uneven.mean(1)).all()
    assert torch.equal(sinkhorn(logits_BSE, valid_BS, scope, False), top_k_ids(logits_BSE, 1)), "outside training it is plain top-k"


@pytest.mark.parametrize("scope", [Scope.sequence, Scope.batch])
def test_sinkhorn_sees_its_scope_and_valid_tokens_alone(scope: Scope) -> None:
    torch.manual_seed(0)
    logits_BSE, valid_BS = torch.randn(2, 100, EXPERTS), torch.rand(2, 100) < 0.7
    before = sinkhorn(logits_BSE, valid_BS, scope, True)
    unseen = sinkhorn(logits_BSE.masked_scatter(~valid_BS.unsqueeze(-1), torch.randn(200, EXPERTS)), valid_BS, scope, True)
    assert torch.equal(before[valid_BS], unseen[valid_BS])
    logits_BSE[1] += 3 * torch.arange(EXPERTS)
    assert torch.equal(sinkhorn(logits_BSE, valid_BS, scope, True)[0], before[0]) == (scope is Scope.sequence)


def sinkhorn(logits_BSE: torch.Tensor, valid_BS: torch.Tensor, scope: Scope, training: bool) -> torch.Tensor:
    router, balance = RouterConfig(selection=Selection.sinkhorn), BalanceConfig(scope=scope)
    config = MoEConfig(experts=EXPERTS, top_k=1, router=router, balance=balance)
    return choose_experts(logits_BSE, valid_BS, config, LocalScope(), training, None).experts_BSK


def loads_of(experts_BSK: torch.Tensor, valid_BS: torch.Tensor, scope: Scope) -> torch.Tensor:
    counts_BE = count_choices(experts_BSK, valid_BS.unsqueeze(-1), EXPERTS).double()
    return counts_BE if scope is Scope.sequence else counts_BE.sum(0, keepdim=True)


def test_chance_of_choice_is_that_of_beating_the_kth_of_the_others() -> None:
    torch.manual_seed(0)
    clean, std, drawn = torch.randn(6, 5).double(), torch.rand(6, 5).double() + 0.1, torch.randn(6, 5).double()
    chance = selection_probability(NoisyLogits(clean + std * drawn, clean, std), 2)
    for t in range(6):
        for expert in range(5):
            others = [(clean + std * drawn)[t, e].item() for e in range(5) if e != expert]
            margin = (clean[t, expert].item() - sorted(others)[-2]) / std[t, expert].item()
            assert chance[t, expert].item() == pytest.approx(0.5 * (1 + math.erf(margin / math.sqrt(2))), rel=1e-9, abs=1e-12)


def test_the_second_expert_is_kept_as_often_as_its_share_says() -> None:
    key_BS = fold_in(token_keys(BatchPosition(), 100, 200, torch.device("cpu")), 3)
    for share in (0.05, 0.2, 0.45, 0.5):
        kept_BSK = sample_second_expert(torch.tensor([1 - share, share]).expand(100, 200, 2) * 3, key_BS)
        assert kept_BSK[..., 0].all()
        assert abs(kept_BSK[..., 1].double().mean() - 2 * share) < 0.015
    assert kept_BSK.all(), "an even second is always kept"
