"""Copy and constant experts: a plain loop over tokens (MoE++), and transformers' MoE layer of LongCat-Flash."""

from typing import Any

import pytest
import torch
from tokenyard.moe.config import BalanceConfig, ModelConfig, MoEConfig, RouterConfig
from tokenyard.moe.init import initialise
from tokenyard.moe.layer import MoELayer
from tokenyard.moe.model import Transformer
from torch import Tensor

EXPERTS, WIDTH, HIDDEN = 4, 16, 8


def layer_of(dtype: torch.dtype = torch.float64, top_k: int = 3, bias: float = 0.0, **router: Any) -> MoELayer:
    moe = MoEConfig(EXPERTS, top_k, HIDDEN, router=RouterConfig(**router), balance=BalanceConfig(bias_rate=bias))
    model = Transformer(ModelConfig(1, WIDTH, 4, 4, vocabulary=8, init_std=0.5, moe=moe), dtype)
    initialise(model, 1)
    layer: Any = model.layers["0"]
    return layer.moe


def test_a_layer_is_a_loop_over_tokens() -> None:
    """Columns: 4 experts, 1 zero, 2 copies, 2 constants."""
    layer = layer_of(null_experts=5, copy_experts=2, constant_experts=2)
    x_BSD = torch.randn(2, 60, WIDTH, dtype=torch.float64)
    routing = layer.router(x_BSD)
    null: Any = layer.router.null
    vectors_CD, expected = null.vectors.weight.T, []
    for x_D, experts_K, weights_K in zip(x_BSD.flatten(0, 1), routing.experts_TK.tolist(), routing.weights_TK, strict=True):
        y_D = torch.zeros(WIDTH, dtype=torch.float64)
        for expert, weight in zip(experts_K, weights_K, strict=True):
            if expert < EXPERTS:
                gate, up = layer.experts.gate_up[expert] @ x_D
                y_D += weight * (layer.experts.down[expert] @ (torch.nn.functional.silu(gate) * up))
            elif 5 <= expert < 7:
                y_D += weight * x_D
            elif expert >= 7:
                a, b = (null.mixing.weight.view(2, 2, WIDTH)[expert - 7] @ x_D).softmax(0)
                y_D += weight * (a * x_D + b * vectors_CD[expert - 7])
        expected.append(y_D)
    torch.testing.assert_close(layer(x_BSD)[0].flatten(0, 1), torch.stack(expected), rtol=0, atol=1e-12)
    assert set(routing.experts_TK.unique().tolist()) == set(range(9)), "every kind was chosen"


def test_identity_experts_are_those_of_longcat() -> None:
    longcat = pytest.importorskip("transformers.models.longcat_flash.modeling_longcat_flash")
    from transformers import LongcatFlashConfig

    sizes = {"hidden_size": WIDTH, "expert_ffn_hidden_size": HIDDEN, "n_routed_experts": EXPERTS, "zero_expert_num": 3}
    config = LongcatFlashConfig(**sizes, moe_topk=3, routed_scaling_factor=6.0)
    config._experts_implementation = "eager"
    theirs = longcat.LongcatFlashMoE(config).double()
    torch.manual_seed(0)
    for tensor in [*theirs.parameters(), *theirs.buffers()]:
        tensor.data.normal_(std=0.3)
    layer = layer_of(bias=0.1, null_experts=3, copy_experts=3, normalize_top_k=False, scale=6.0)
    gate_up: Tensor = theirs.experts.gate_up_proj
    with torch.no_grad():
        layer.router.get_parameter("weight").copy_(theirs.router.classifier.weight)
        layer.router.get_buffer("expert_bias").copy_(theirs.router.e_score_correction_bias)
        layer.experts.gate_up.copy_(gate_up[:EXPERTS].view(EXPERTS, 2, HIDDEN, WIDTH))
        layer.experts.down.copy_(theirs.experts.down_proj)
    x_BSD = torch.randn(2, 50, WIDTH, dtype=torch.float64)
    found, stats = layer(x_BSD)
    torch.testing.assert_close(found, theirs(x_BSD), rtol=0, atol=2e-5)  # theirs routes in fp32
    assert stats.counts_BE[:, EXPERTS:].sum() > 0


@pytest.mark.parametrize("kinds", [{"copy_experts": 2}, {"copy_experts": 1, "constant_experts": 2}])
def test_gradients_and_types(kinds: dict[str, int]) -> None:
    layer = layer_of(null_experts=3, top_k=2, **kinds)
    x_BSD = torch.randn(1, 6, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = layer.router.get_parameter("weight")

    def outputs(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"router.weight": weight}, (x,))[0]

    assert torch.autograd.gradcheck(outputs, (x_BSD, weights), atol=1e-6)
    layer(x_BSD)[0].sum().backward()
    assert all(parameter.grad is not None for name, parameter in layer.named_parameters() if ".null." in name)
    narrow = layer_of(torch.float32, null_experts=3, **kinds)
    assert narrow(torch.randn(1, 4, WIDTH).bfloat16())[0].dtype == torch.bfloat16
