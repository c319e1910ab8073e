"""The Triton kernels of the router equal the code that they replace. They run in Triton's interpreter, on the CPU."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from tokenyard.bench.gpu.routers import ROUTERS
from tokenyard.moe import router as router_module
from tokenyard.moe.config import BalanceConfig, DropPolicy, GroupScore, MoEConfig, RouterConfig, Score
from tokenyard.moe.device import dry_run
from tokenyard.moe.kernel_router import is_covered, route
from tokenyard.moe.kernels.routing import CHUNK
from tokenyard.moe.router import Router, Routing
from tokenyard.moe.scoring import gate_weights, to_scores
from tokenyard.moe.token_info import TokenInfo
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("bounded_kernels"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # numpy's, which the interpreter uses
]

WIDTH = 16
LOSSES = {"coefficient": 0.1, "bias_rate": 0.01}
NO_LOSSES = {"coefficient": 0.0}
GROUPS = {"score": Score.sigmoid, "groups": 4, "top_groups": 2, "scale": 2.5}
CASES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {  # experts, top_k, router, balance
    "qwen3": (128, 8, {}, {"coefficient": 0.001}),
    "olmoe, no losses": (60, 8, {"normalize_top_k": False}, NO_LOSSES),
    "switch": (3, 1, {}, LOSSES),
    "one expert": (1, 1, {"normalize_one": True}, LOSSES),
    "all experts, scaled": (5, 5, {"scale": 0.5}, NO_LOSSES),
    "gpt-oss": (12, 4, {"softmax_after_top_k": True, "bias": True}, LOSSES),
    "sigmoid": (20, 3, {"score": Score.sigmoid, "normalize_top_k": False}, NO_LOSSES),
    "deepseek v2": (12, 3, {**GROUPS, "score": Score.softmax, "normalize_top_k": False}, LOSSES | {"device_coefficient": 0.1}),
    "deepseek v3": (
        24,
        4,
        {**GROUPS, "group_score": GroupScore.top2},
        {"sequence_coefficient": 0.1, "sequence_by_scores": True} | LOSSES,
    ),
    "pooled, communication": (8, 2, {"groups": 2}, {"pool_layers": True, "communication_coefficient": 0.1}),
    "512": (512, 8, {}, LOSSES),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_routing_and_gradients_are_those_of_the_other_code(case: tuple[int, int, dict[str, Any], dict[str, Any]]) -> None:
    experts, top_k, router, balance = case
    torch.manual_seed(0)
    config = MoEConfig(experts, top_k, z_coefficient=0.01 if experts != 60 else 0.0, hidden=8)
    config.router, config.balance = RouterConfig(**router), BalanceConfig(**balance)
    made = Router(WIDTH, config, torch.float32).train()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if made.expert_bias is not None:
        made.expert_bias.normal_(std=0.1)
    made.collects_metrics = experts == 12
    length = CHUNK + 3 if experts < 30 else 5
    x_BSD = torch.randn(2, length, WIDTH)
    x_BSD[0, :2] = 0.0  # all logits are equal
    tokens = TokenInfo(None if experts == 20 else torch.rand(2, length) < 0.7)
    expected = routed(made, x_BSD, tokens)
    with dry_run("cuda"), patch.object(router_module, "route", wraps=route) as kernels:
        found = routed(made, x_BSD, tokens)
    assert kernels.called
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = float(value.abs().max()) if value.is_floating_point() else 0.0
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * largest + 1e-6 * (largest > 0), msg=name)


def routed(made: Router, x_BSD: Tensor, tokens: TokenInfo) -> dict[str, Tensor]:
    """All tensors of the routing, and the gradients of a random sum of those that have some."""
    made.zero_grad()
    routing: Routing = made(x_BSD, tokens)
    found = {name: value for name, value in routing._asdict().items() if isinstance(value, Tensor)}
    stats = routing.stats
    found |= {name: value for one in (stats, stats.pooled, stats.router_metrics) if one for name, value in one._asdict().items()}
    found = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    generator = torch.Generator().manual_seed(0)
    differentiable = [value for value in found.values() if value.requires_grad]
    sum((value * torch.randn(value.shape, generator=generator)).sum() for value in differentiable).backward()
    grads = {f"gradient of {name}": parameter.grad for name, parameter in made.named_parameters()}
    known = {f"{name} has a gradient": torch.tensor(value.requires_grad) for name, value in found.items()}
    return {name: value.detach() for name, value in (found | grads | known).items() if value is not None}


@pytest.mark.parametrize("kind", [{"score": Score.sigmoid}, {}, {"softmax_after_top_k": True}], ids=["sigmoid", "softmax", "after"])
def test_of_equal_scores_the_lower_id_wins_and_nan_before_all(kind: dict[str, Any]) -> None:
    nan, inf = torch.nan, torch.inf
    logits_BSE = torch.tensor(
        [[0, 1, 1, 0, 1], [nan, 2, nan, 3, 1], [-nan, 2, 4, 3, nan], [inf, 1, -inf, inf, 2], 5 * [-inf], [0.0, -0.0, 0.0, -0.0, -1]]
    )[None]
    config = MoEConfig(5, 3, hidden=8, router=RouterConfig(**kind))
    scores_BSE = to_scores(logits_BSE, config.router.score)
    ranked_BSE = logits_BSE if config.router.softmax_after_top_k else scores_BSE
    experts_BSK = ranked_BSE.sort(dim=-1, descending=True, stable=True).indices[..., :3]
    found = route(logits_BSE, None, None, config)
    assert torch.equal(found.experts_BSK, experts_BSK)
    expected = gate_weights(logits_BSE, scores_BSE, experts_BSK, config)
    torch.testing.assert_close(found.weights_BSK, expected, equal_nan=True)


def test_experts_can_be_given() -> None:
    logits_BSE, given_BSK = torch.randn(2, 3, 6), torch.rand(2, 3, 6).topk(2).indices
    config = MoEConfig(6, 2, hidden=8)
    found = route(logits_BSE, None, None, config, given_BSK)
    assert torch.equal(found.experts_BSK, given_BSK)
    assert torch.equal(
        found.counts_BE, torch.zeros_like(found.counts_BE).scatter_add(1, given_BSK.flatten(1), torch.ones(2, 6).long())
    )
    torch.testing.assert_close(found.weights_BSK, gate_weights(logits_BSE, logits_BSE.softmax(-1), given_BSK, config))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_no_tokens(shape: tuple[int, int]) -> None:
    logits_BSE = torch.randn(*shape, 6, requires_grad=True)
    found = route(logits_BSE, None, None, MoEConfig(6, 2, hidden=8))
    assert found.weights_BSK.shape == (*shape, 2)
    assert found.z == 0 and found.counts_BE.shape == found.scores_BE.shape == (shape[0], 6)
    assert not found.counts_BE.any() and not found.scores_BE.any() and not found.tokens_B.any()
    (found.weights_BSK.sum() + found.z).backward()
    assert logits_BSE.grad is not None and logits_BSE.grad.shape == (*shape, 6)


def test_which_routers_keep_the_other_code() -> None:
    """Noise is not in the configuration's hands alone: there is none outside training."""
    dropping = {name: bool(config.capacity.factor or config.capacity.schedule) for name, config in ROUTERS.items()}
    kept = {name for name, config in ROUTERS.items() if not is_covered(config, dropping[name])}
    scored = {name for name, config in ROUTERS.items() if config.capacity.policy in (DropPolicy.priority, DropPolicy.probability)}
    gshard = {"gshard", "gshard by batch", "gshard in groups"}
    others = {"sqrtsoftplus", "hash", "sinkhorn", "sinkhorn by batch", "expert choice", "expert choice by batch"}
    assert not is_covered(MoEConfig(1025, 2), dropping=False), "nor more columns than a program has in registers"
    assert kept == scored | gshard | others | {"noise, importance and load", "importance by sequence"}
