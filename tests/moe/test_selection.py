"""Who is chosen: against transformers' routers, plain loops, and what each selection promises."""

import logging
import math
from typing import Any

import pytest
import torch
from tokenyard.moe.capacity import OneDevice, count_choices
from tokenyard.moe.config import (
    BalanceConfig,
    CapacityConfig,
    GroupScore,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    Scope,
    Score,
    Selection,
)
from tokenyard.moe.init import initialise
from tokenyard.moe.model import Transformer
from tokenyard.moe.noise import fold
from tokenyard.moe.router import Router, Routing
from tokenyard.moe.scores import Noisy, chance_of_choice, hash_scores
from tokenyard.moe.selection import best, choose, second_is_kept
from tokenyard.moe.tokens import Place, Tokens, places

EXPERTS, WIDTH = 8, 16


def test_best_is_top_k_and_takes_the_first_of_equals() -> None:
    torch.manual_seed(0)
    scores = torch.rand(3, 50, 9)
    assert torch.equal(best(scores, 4), scores.topk(4).indices)
    assert torch.equal(best(torch.zeros(2, 300), 5), torch.arange(5).expand(2, 5))
    assert best(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 4).tolist() == [1, 3, 2, 4]


def theirs_v2(**changes: Any) -> Any:
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2

    config = v2.DeepseekV2Config(
        n_routed_experts=EXPERTS, hidden_size=WIDTH, num_experts_per_tok=3, num_attention_heads=4, **changes
    )
    config.num_experts = EXPERTS
    return v2.DeepseekV2TopkRouter(config)


def theirs_v3(**changes: Any) -> Any:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

    return v3.DeepseekV3TopkRouter(
        v3.DeepseekV3Config(n_routed_experts=EXPERTS, hidden_size=WIDTH, num_experts_per_tok=3, n_group=4, topk_group=2, **changes)
    )


def theirs_qwen3(**changes: Any) -> Any:
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

    return qwen3.Qwen3MoeTopKRouter(qwen3.Qwen3MoeConfig(num_experts=EXPERTS, hidden_size=WIDTH, num_experts_per_tok=3, **changes))


def theirs_gpt_oss() -> Any:
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

    return gpt_oss.GptOssTopKRouter(gpt_oss.GptOssConfig(num_local_experts=EXPERTS, hidden_size=WIDTH, num_experts_per_tok=3))


V3 = {"score": Score.sigmoid, "groups": 4, "top_groups": 2, "group_score": GroupScore.top2}
PEERS = {
    "deepseek v2 greedy": (
        lambda: theirs_v2(topk_method="greedy", routed_scaling_factor=16.0),
        {"normalize_top_k": False, "scale": 16.0},
    ),
    "deepseek v2": (
        lambda: theirs_v2(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=2.0),
        {"normalize_top_k": False, "scale": 2.0, "groups": 4, "top_groups": 2},
    ),
    "deepseek v3": (lambda: theirs_v3(norm_topk_prob=True, routed_scaling_factor=2.5), {**V3, "scale": 2.5}),
    "deepseek v3, not normalised": (
        lambda: theirs_v3(norm_topk_prob=False, routed_scaling_factor=1.0),
        {**V3, "normalize_top_k": False},
    ),
    "qwen3": (lambda: theirs_qwen3(norm_topk_prob=True), {}),
    "olmoe": (lambda: theirs_qwen3(norm_topk_prob=False), {"normalize_top_k": False}),
    "gpt-oss": (theirs_gpt_oss, {"softmax_after_top_k": True, "bias": True}),
}


@pytest.mark.parametrize("peer", PEERS)
def test_chooses_and_weighs_as_transformers_does(peer: str) -> None:
    """In fp32, bit for bit in the choices; a V3 router has an expert bias that changes them."""
    pytest.importorskip("transformers", reason="the comparison needs transformers (pip install 'tokenyard[hf]')")
    make, settings = PEERS[peer]
    theirs, ours = make(), Router(WIDTH, MoEConfig(experts=EXPERTS, top_k=3, router=RouterConfig(**settings)), torch.float32)
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.get_parameter("weight").data.copy_(theirs.weight)
    if ours.bias is not None:
        ours.bias.data.copy_(theirs.bias)
    x_TD = torch.randn(200, WIDTH)
    unbiased = choices(ours.eval()(x_TD.unsqueeze(0)))
    if "v3" in peer:
        ours.add_expert_bias()
        assert ours.expert_bias is not None
        ours.expert_bias.normal_(std=0.5)
        theirs.e_score_correction_bias.copy_(ours.expert_bias)
    _, weights_TK, experts_TK = theirs(x_TD)
    expected = torch.zeros(200, EXPERTS).scatter(1, experts_TK, weights_TK)
    routing = ours(x_TD.unsqueeze(0))
    assert torch.equal(choices(routing), torch.zeros(200, EXPERTS, dtype=torch.bool).scatter(1, experts_TK, True))
    assert ("v3" in peer) == (not torch.equal(choices(routing), unbiased))
    dense = torch.zeros(200, EXPERTS).scatter(1, routing.experts_TK, routing.weights_TK.detach())
    torch.testing.assert_close(dense, expected, rtol=1e-6, atol=1e-7)


def test_hash_is_balanced_fixed_and_another_in_each_layer() -> None:
    ids_BS = torch.arange(EXPERTS * 100).view(4, -1)
    scores = [hash_scores(Tokens(ids_BS=ids_BS, layer=layer), EXPERTS, 2, torch.float32).flatten(0, 1) for layer in (0, 1)]
    for scores_TE in scores:
        assert (scores_TE.sum(1) == 2).all()
        assert (scores_TE.unflatten(0, (100, EXPERTS)).sum(1) == 2).all(), "each run of ids meets each expert equally often"
        assert scores_TE.unflatten(0, (100, EXPERTS)).flatten(1).unique(dim=0).shape[0] > 95, "runs differ"
    assert 0.2 < (scores[0] * scores[1]).sum() / scores[0].sum() < 0.3, "by chance a layer shares K / E with another"
    again = hash_scores(Tokens(ids_BS=ids_BS.flip(1)), EXPERTS, 2, torch.float32)
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
        routing = router(torch.randn(1, 5, WIDTH), Tokens(ids_BS=torch.arange(5).unsqueeze(0)))
        torch.testing.assert_close(routing.weights_TK, torch.full((5, top_k), 3.0 * weight))


@pytest.mark.parametrize("scope", [Scope.sequence, Scope.batch])
def test_sinkhorn_evens_the_load_of_its_scope(scope: Scope) -> None:
    torch.manual_seed(0)
    logits_BSE, valid_BS = torch.randn(2, 400, EXPERTS) + 2 * torch.arange(EXPERTS) / EXPERTS, torch.rand(2, 400) < 0.9
    even, uneven = (loads_of(sinkhorn(logits_BSE, valid_BS, scope, training), valid_BS, scope) for training in (True, False))
    assert (even.amax(1) < 1.3 * even.mean(1)).all() and (even.amin(1) > 0.7 * even.mean(1)).all()
    assert (uneven.amax(1) > 2 * uneven.mean(1)).all()
    assert torch.equal(sinkhorn(logits_BSE, valid_BS, scope, False), best(logits_BSE, 1)), "outside training it is plain top-k"


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
    return choose(logits_BSE, valid_BS, config, OneDevice(), training, None).experts_BSK


def loads_of(experts_BSK: torch.Tensor, valid_BS: torch.Tensor, scope: Scope) -> torch.Tensor:
    counts_BE = count_choices(experts_BSK, valid_BS.unsqueeze(-1), EXPERTS).double()
    return counts_BE if scope is Scope.sequence else counts_BE.sum(0, keepdim=True)


@pytest.mark.parametrize("scope", [Scope.sequence, Scope.batch])
def test_each_expert_takes_its_best_tokens(scope: Scope) -> None:
    router = random_router(
        MoEConfig(
            experts=EXPERTS,
            top_k=2,
            router=RouterConfig(selection=Selection.expert_choice),
            capacity=CapacityConfig(factor=0.9, scope=scope),
        )
    )
    x_BSD, valid_BS = torch.randn(3, 10, WIDTH), torch.rand(3, 10) < 0.8
    routing = router(x_BSD, Tokens(valid_BS))
    scores_BSE = (x_BSD @ router.get_parameter("weight").T).softmax(-1).masked_fill(~valid_BS.unsqueeze(-1), -1.0)
    assert routing.kept_TK is not None
    kept_BSE = routing.kept_TK.view(3, 10, EXPERTS)
    scopes, rows = [(scores_BSE[b], kept_BSE[b]) for b in range(3)], 3  # ceil(0.9 * 10 * 2 / 8)
    if scope is Scope.batch:
        scopes, rows = [(scores_BSE.flatten(0, 1), kept_BSE.flatten(0, 1))], 7  # ceil(0.9 * 30 * 2 / 8)
    for scores_TE, kept_TE in scopes:
        for expert in range(EXPERTS):
            expected = scores_TE[:, expert].topk(rows).indices
            assert kept_TE[:, expert].nonzero().flatten().tolist() == sorted(expected.tolist())
    torch.testing.assert_close(routing.weights_TK.view(3, 10, EXPERTS)[kept_BSE], scores_BSE[kept_BSE])
    assert routing.stats.counts_BE.sum() == kept_BSE.sum() and routing.stats.dropped == 0


def test_an_expert_takes_no_token_that_does_not_count_even_if_it_has_room() -> None:
    router = random_router(MoEConfig(experts=EXPERTS, top_k=4, router=RouterConfig(selection=Selection.expert_choice)))
    valid_BS = torch.zeros(1, 10, dtype=torch.bool)
    valid_BS[0, 3] = True
    routing = router(torch.randn(1, 10, WIDTH), Tokens(valid_BS))
    assert routing.kept_TK is not None
    assert torch.equal(routing.kept_TK, valid_BS.view(10, 1).expand(10, EXPERTS))


def test_chance_of_choice_is_that_of_beating_the_kth_of_the_others() -> None:
    torch.manual_seed(0)
    clean, std, drawn = torch.randn(6, 5).double(), torch.rand(6, 5).double() + 0.1, torch.randn(6, 5).double()
    chance = chance_of_choice(Noisy(clean + std * drawn, clean, std), 2)
    for t in range(6):
        for expert in range(5):
            others = [(clean + std * drawn)[t, e].item() for e in range(5) if e != expert]
            margin = (clean[t, expert].item() - sorted(others)[-2]) / std[t, expert].item()
            assert chance[t, expert].item() == pytest.approx(0.5 * (1 + math.erf(margin / math.sqrt(2))), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("selection", [Selection.expert_choice, Selection.top_k])
def test_expert_choice_sees_later_tokens(
    selection: Selection, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leak, and the line that tells of it: another last token, another output for an earlier one."""
    monkeypatch.setattr(logging.getLogger("tokenyard"), "propagate", True)  # a run in this process may have set up logging
    moe = MoEConfig(experts=4, hidden=8, router=RouterConfig(selection=selection))
    model = Transformer(ModelConfig(layers=2, width=16, heads=2, kv_heads=2, vocabulary=40, init_std=0.3, moe=moe), torch.float64)
    initialise(model, 1)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == (
        ["expert_choice looks ahead"] if selection is Selection.expert_choice else []
    )
    ids_BS, leaks = torch.randint(40, (1, 12), generator=torch.Generator().manual_seed(0)), False
    before = model(ids_BS)
    for token in range(40):
        ids_BS[0, -1] = token
        leaks |= not torch.allclose(model(ids_BS)[:, :-1], before[:, :-1], rtol=0, atol=1e-9)
    assert leaks == (selection is Selection.expert_choice)


def test_the_second_expert_is_kept_as_often_as_its_share_says() -> None:
    key_BS = fold(places(Place(), 100, 200, torch.device("cpu")), 3)
    for share in (0.05, 0.2, 0.45, 0.5):
        kept_BSK = second_is_kept(torch.tensor([1 - share, share]).expand(100, 200, 2) * 3, key_BS)
        assert kept_BSK[..., 0].all()
        assert abs(kept_BSK[..., 1].double().mean() - 2 * share) < 0.015
    assert kept_BSK.all(), "an even second is always kept"


def random_router(config: MoEConfig) -> Router:
    torch.manual_seed(3)
    router = Router(WIDTH, config, torch.float32)
    torch.nn.init.normal_(router.get_parameter("weight"), std=0.4)
    return router


def choices(routing: Routing) -> torch.Tensor:
    return torch.zeros(len(routing.experts_TK), EXPERTS, dtype=torch.bool).scatter(1, routing.experts_TK, True)
