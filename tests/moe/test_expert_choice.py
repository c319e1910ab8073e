"""Expert choice: which tokens experts take, and that it looks ahead and logs a warning."""

import logging

import pytest
import torch
from tokenyard.moe.config import CapacityConfig, ModelConfig, MoEConfig, RouterConfig, Scope, Selection
from tokenyard.moe.init import initialise
from tokenyard.moe.model import Transformer
from tokenyard.moe.router import Router
from tokenyard.moe.token_info import TokenInfo

EXPERTS, WIDTH = 8, 16


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
    routing = router(x_BSD, TokenInfo(valid_BS))
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
    routing = router(torch.randn(1, 10, WIDTH), TokenInfo(valid_BS))
    assert routing.kept_TK is not None
    assert torch.equal(routing.kept_TK, valid_BS.view(10, 1).expand(10, EXPERTS))


@pytest.mark.parametrize("selection", [Selection.expert_choice, Selection.top_k])
def test_expert_choice_sees_later_tokens(
    selection: Selection, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A different last token changes the output of an earlier one, and a warning is logged."""
    monkeypatch.setattr(logging.getLogger("tokenyard"), "propagate", True)  # a run in this process may have set up logging
    moe = MoEConfig(experts=4, hidden=8, router=RouterConfig(selection=selection))
    model = Transformer(ModelConfig(layers=2, width=16, heads=2, kv_heads=2, vocabulary=40, init_std=0.3, moe=moe), torch.float64)
    initialise(model, 1)
    assert {record.getMessage().split(":")[0] for record in caplog.records} == (
        {"expert_choice looks ahead"} if selection is Selection.expert_choice else set()
    )
    ids_BS, leaks = torch.randint(40, (1, 12), generator=torch.Generator().manual_seed(0)), False
    before = model(ids_BS)
    for token in range(40):
        ids_BS[0, -1] = token
        leaks |= not torch.allclose(model(ids_BS)[:, :-1], before[:, :-1], rtol=0, atol=1e-9)
    assert leaks == (selection is Selection.expert_choice)


def random_router(config: MoEConfig) -> Router:
    torch.manual_seed(3)
    router = Router(WIDTH, config, torch.float32)
    torch.nn.init.normal_(router.get_parameter("weight"), std=0.4)
    return router
