"""Scores, choices and statistics of the router against fp64 and plain counting."""

import pytest
import torch
from tokenyard.moe.config import ModelConfig, MoEConfig, RouterConfig
from tokenyard.moe.layer import MoELayer
from tokenyard.moe.router import Router, RoutingStats
from tokenyard.moe.token_info import TokenInfo
from torch import Tensor

EXPERTS, WIDTH = 6, 32


def test_is_fp32_when_activations_are_bf16() -> None:
    """Within fp32 rounding of fp64 arithmetic on the same numbers; bf16 logits would be off by 1e-2."""
    router = random_router(MoEConfig(experts=EXPERTS, top_k=2, router=RouterConfig(normalize_top_k=False)), torch.float32)
    x_BSD = torch.randn(2, 9, WIDTH).bfloat16()
    routing = router(x_BSD)
    logits_BSE = x_BSD.double() @ router.weight.double().T
    scores_TE = logits_BSE.softmax(-1).flatten(0, 1)
    weights_TK, experts_TK = scores_TE.topk(2)
    assert torch.equal(routing.experts_TK, experts_TK)
    assert routing.weights_TK.dtype == routing.stats.scores_BE.dtype == routing.stats.z.dtype == torch.float32
    torch.testing.assert_close(routing.weights_TK.double(), weights_TK, rtol=0, atol=1e-6)
    torch.testing.assert_close(routing.stats.scores_BE.double(), scores_TE.view(2, 9, -1).sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(routing.stats.z.double(), logits_BSE.logsumexp(-1).square().sum(), rtol=1e-6, atol=0)


def test_is_fp64_in_an_fp64_model() -> None:
    router = random_router(MoEConfig(experts=EXPERTS, top_k=2), torch.float64)
    assert router(torch.randn(1, 3, WIDTH, dtype=torch.float64)).weights_TK.dtype == torch.float64


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_statistics_against_plain_counting(top_k: int, masked: bool) -> None:
    router = random_router(MoEConfig(experts=EXPERTS, top_k=top_k), torch.float64)
    x_BSD, valid_BS = torch.randn(3, 7, WIDTH, dtype=torch.float64), torch.rand(3, 7) < 0.6
    stats: RoutingStats = router(x_BSD, TokenInfo(valid_BS if masked else None)).stats
    counts, scores, z = torch.zeros(3, EXPERTS, dtype=torch.int64), torch.zeros(3, EXPERTS, dtype=torch.float64), 0.0
    for b in range(3):
        for s in range(7):
            if masked and not valid_BS[b, s]:
                continue
            logits_E = router.weight.detach() @ x_BSD[b, s]
            for expert in logits_E.argsort(descending=True)[:top_k].tolist():
                counts[b, expert] += 1
            scores[b] += logits_E.exp() / logits_E.exp().sum()
            z += logits_E.exp().sum().log().item() ** 2
    assert torch.equal(stats.counts_BE, counts) and stats.counts_BE.dtype == torch.int64
    assert stats.counts_BE.sum() == (int(valid_BS.sum()) if masked else 21) * top_k
    assert stats.dropped == 0
    torch.testing.assert_close(stats.scores_BE, scores)
    torch.testing.assert_close(stats.z.item(), z)


def test_weights_of_a_token() -> None:
    torch.manual_seed(0)
    x_BSD = torch.randn(1, 8, WIDTH, dtype=torch.float64)
    scores_TE = scores_of(random_router(MoEConfig(experts=EXPERTS), torch.float64), x_BSD)
    for top_k, normalized in ((2, True), (3, False), (1, True), (1, False), (EXPERTS, True)):
        config = MoEConfig(experts=EXPERTS, top_k=top_k, router=RouterConfig(normalize_top_k=normalized))
        routing = random_router(config, torch.float64)(x_BSD)
        chosen_TK = scores_TE.sort(descending=True).values[:, :top_k]
        divisor = chosen_TK.sum(1, keepdim=True) if normalized and top_k > 1 else 1.0
        torch.testing.assert_close(routing.weights_TK, chosen_TK / divisor)


def test_top_1_teaches_the_router_through_the_output() -> None:
    """With normalised weights all weights would be 1, whatever the scores."""
    config = ModelConfig(width=WIDTH, moe=MoEConfig(experts=EXPERTS, top_k=1, hidden=16))
    layer = MoELayer(config, torch.float64)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    y_BSD, _ = layer(torch.randn(2, 5, WIDTH, dtype=torch.float64))
    y_BSD.square().sum().backward()
    assert layer.router.weight.grad is not None
    assert (layer.router.weight.grad.abs().amax(1) > 1e-6).all()


def random_router(config: MoEConfig, dtype: torch.dtype) -> Router:
    torch.manual_seed(3)
    router = Router(WIDTH, config, dtype)
    torch.nn.init.normal_(router.weight, std=0.4)
    return router


def scores_of(router: Router, x_BSD: Tensor) -> Tensor:
    return (x_BSD.flatten(0, 1) @ router.weight.detach().T).softmax(-1)
