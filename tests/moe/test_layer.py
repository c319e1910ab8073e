"""The MoE layer against a loop over tokens, and its derivatives with dropped choices."""

import pytest
import torch
import torch.nn.functional as F
from tokenyard.moe.config import CapacityConfig, ModelConfig, MoEConfig, RouterConfig, Scope
from tokenyard.moe.layer import MoELayer
from tokenyard.moe.token_info import TokenInfo
from torch import Tensor

WIDTH = 4
CASES = {
    "dropless": MoEConfig(experts=5, top_k=2, hidden=3),
    "top-1": MoEConfig(experts=5, top_k=1, hidden=3),
    "dropping": MoEConfig(experts=5, top_k=2, hidden=3, capacity=CapacityConfig(factor=0.7, scope=Scope.batch)),
    "shared expert": MoEConfig(experts=5, top_k=2, hidden=3, shared_hidden=6, router=RouterConfig(normalize_top_k=False)),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_equals_a_loop_over_tokens(config: MoEConfig) -> None:
    layer, x_BSD = random_layer(config), torch.randn(2, 6, WIDTH, dtype=torch.float64)
    y_BSD, stats = layer(x_BSD)
    assert (stats.dropped > 0) == (config.capacity.factor is not None)
    kept_TK = layer.router(x_BSD).kept_TK
    for t, x_D in enumerate(x_BSD.flatten(0, 1)):
        torch.testing.assert_close(y_BSD.flatten(0, 1)[t], one_token(layer, x_D, None if kept_TK is None else kept_TK[t]))


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_derivatives(config: MoEConfig) -> None:
    layer = random_layer(config)
    x_BSD = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)

    def outputs(x_BSD: Tensor, *_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y_BSD, stats = layer(x_BSD)
        return y_BSD, stats.scores_BE, stats.z

    assert torch.autograd.gradcheck(outputs, (x_BSD, *layer.parameters()))


def test_tokens_that_are_not_counted_pass_their_experts_all_the_same() -> None:
    """Without a capacity, validity only affects the statistics."""
    layer, x_BSD = random_layer(CASES["dropless"]), torch.randn(2, 6, WIDTH, dtype=torch.float64)
    assert torch.equal(layer(x_BSD, TokenInfo(torch.rand(2, 6) < 0.5))[0], layer(x_BSD)[0])


def random_layer(config: MoEConfig) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(ModelConfig(width=WIDTH, moe=config), torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def one_token(layer: MoELayer, x_D: Tensor, kept_K: Tensor | None) -> Tensor:
    config = layer.router.config
    scores_E = (layer.router.weight @ x_D).softmax(0)
    chosen = scores_E.argsort(descending=True)[: config.top_k].tolist()
    total = sum(scores_E[e] for e in chosen) if config.router.normalize_top_k and config.top_k > 1 else 1.0
    y_D = torch.zeros(WIDTH, dtype=torch.float64)
    for k, expert in enumerate(chosen):
        if kept_K is None or kept_K[k]:
            gate, up = layer.experts.gate_up[expert]
            y_D = y_D + scores_E[expert] / total * (layer.experts.down[expert] @ (F.silu(gate @ x_D) * (up @ x_D)))
    if layer.shared is not None:
        gate, up = layer.shared.gate_up
        y_D = y_D + layer.shared.down @ (F.silu(gate @ x_D) * (up @ x_D))
    return y_D
