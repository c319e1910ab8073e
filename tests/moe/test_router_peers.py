"""Our router gives the experts and weights of the routers of transformers."""

from typing import Any

import pytest
import torch
from tokenyard.moe.config import GroupScore, MoEConfig, RouterConfig, Score
from tokenyard.moe.router import Router, Routing

EXPERTS, WIDTH = 8, 16


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
    """In fp32, with equal choices bit for bit; the V3 router has an expert bias that changes them."""
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


def choices(routing: Routing) -> torch.Tensor:
    return torch.zeros(len(routing.experts_TK), EXPERTS, dtype=torch.bool).scatter(1, routing.experts_TK, True)
