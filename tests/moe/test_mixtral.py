"""The model equals transformers' Mixtral: logits, cross entropy, load-balance loss and all gradients, from the same weights.

Transformers widens norms, rotary angles and router to fp32 even in an fp64 model. For the fp64 comparison each of these
widenings goes to fp64 instead (tests/moe/conftest.py); nothing else of its code is changed.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenyard.data.batches import IGNORE
from tokenyard.moe.config import AttentionConfig, BalanceConfig, ModelConfig, MoEConfig, RopeConfig, RouterConfig, Scope, Score
from tokenyard.moe.model import Transformer
from tokenyard.moe.router import Router
from tokenyard.moe.token_info import TokenInfo
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import build_mesh
from tokenyard.train.loss import Losses, Totals, add_pooled_balance, losses, pooled_sums
from torch import Tensor

pytest.importorskip("transformers", reason="the Mixtral comparison needs transformers (pip install 'tokenyard[hf]')")
from transformers.models.mixtral import modeling_mixtral as mixtral

AUXILIARY = 0.05
PRECISIONS = [pytest.param(torch.float32, 1e-4, id="fp32"), pytest.param(torch.float64, 1e-8, id="fp64")]
NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "feedforward_norm.weight": "post_attention_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.o.weight": "self_attn.o_proj.weight",
    "moe.router.weight": "mlp.gate.weight",
    "moe.experts.gate_up": "mlp.experts.gate_up_proj",
    "moe.experts.down": "mlp.experts.down_proj",
}


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_same_logits_loss_and_gradients(dtype: torch.dtype, tolerance: float, widen) -> None:
    theirs, ours = pair(2, dtype, widen)
    ids, labels = batch()
    expected = theirs(input_ids=ids, labels=labels)
    logits, share = forward(ours, ids, labels, balance=0.0)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=tolerance)
    torch.testing.assert_close(share.cross_entropy, expected.loss, rtol=0, atol=tolerance)
    expected.loss.backward()
    share.objective.backward()
    assert_same_gradients(ours, theirs, tolerance)


@pytest.mark.parametrize("layers", [1, 2, 4, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-4), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_their_load_balance_loss_pools_the_layers(dtype: torch.dtype, tolerance: float, layers: int, widen) -> None:
    """Their loss counts choices per token, ours per choice, so that an even load gives 1."""
    theirs, ours = pair(layers, dtype, widen)
    ours.config.moe.balance.pool_layers = True
    ids, labels = batch()
    expected = theirs(input_ids=ids, labels=labels, output_router_logits=True)
    share = forward(ours, ids, labels, balance=AUXILIARY * ours.config.moe.top_k)[1]
    torch.testing.assert_close(ours.config.moe.top_k * share.balance_L.sum(), expected.aux_loss, rtol=0, atol=tolerance)
    torch.testing.assert_close(share.objective, expected.loss, rtol=0, atol=tolerance)
    expected.loss.backward()
    share.objective.backward()
    assert_same_gradients(ours, theirs, tolerance)


@pytest.mark.parametrize("score", Score)
@pytest.mark.parametrize("layers", [1, 2, 4, 8])
def test_their_loss_does_not_depend_on_how_experts_are_chosen(layers: int, score: Score, widen) -> None:
    """Its probabilities are those of a softmax, and its counts those of the largest, also with sigmoids, groups and biases."""
    widen(mixtral)
    balance = BalanceConfig(0.7, Scope.batch, pool_layers=True, bias_rate=0.01)
    limited = RouterConfig(score, groups=4, top_groups=2)
    config = MoEConfig(experts=8, top_k=3, z_coefficient=0.0, router=limited, balance=balance)
    generator = torch.Generator().manual_seed(layers)
    valid_BS = torch.rand(3, 9, generator=generator) < 0.8
    stats, of_layers, weights, different = [], [], [], 0
    for _ in range(layers):
        router, x_BSD = Router(6, config, torch.float64), torch.randn(3, 9, 6, dtype=torch.float64, generator=generator)
        weights.append(torch.nn.init.normal_(router.get_parameter("weight"), generator=generator))
        router.get_buffer("expert_bias").normal_(std=0.3, generator=generator)
        routing = router(x_BSD, TokenInfo(valid_BS))
        stats.append(routing.stats)
        of_layers.append((x_BSD @ weights[-1].T).flatten(0, 1))
        different += (routing.experts_TK.sort(-1).values != of_layers[-1].topk(3).indices.sort(-1).values).sum().item()
    assert different > 10
    totals, mesh = Totals(int(valid_BS.sum()), 3, 1), build_mesh(ParallelConfig())
    share = losses(torch.zeros((), dtype=torch.float64), stats, config, totals, mesh)
    share = add_pooled_balance(share, pooled_sums(stats, config), config, totals, mesh)
    expected = mixtral.load_balancing_loss_func(tuple(of_layers), 8, 3, attention_mask=valid_BS)
    torch.testing.assert_close(3 * share.balance_L.sum(), expected.detach(), rtol=0, atol=1e-10)
    found, theirs = (torch.autograd.grad(loss, weights) for loss in (share.objective, 0.7 / 3 * expected))
    for mine, of_theirs in zip(found, theirs, strict=True):
        assert of_theirs.abs().max() > 1e-4
        torch.testing.assert_close(mine, of_theirs, rtol=0, atol=1e-10)


def test_their_masked_load_balance_loss_is_top_k_times_ours() -> None:
    torch.manual_seed(1)
    logits_BSE = torch.randn(2, 5, 4)
    valid_BS = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = mixtral.load_balancing_loss_func((logits_BSE.flatten(0, 1),), 4, 2, attention_mask=valid_BS)
    router = Router(4, moe_config(1.0), torch.float32)
    torch.nn.init.eye_(router.weight)
    stats = router(logits_BSE, TokenInfo(valid_BS.bool())).stats
    share = losses(torch.zeros(()), [stats], moe_config(1.0), Totals(8, 2, 1), build_mesh(ParallelConfig()))
    torch.testing.assert_close(2 * share.balance_L[0], expected)


def pair(layers: int, dtype: torch.dtype, widen: Callable[..., None]) -> tuple[Any, Transformer]:
    """Returns their model and ours, with the same random weights (norms too)."""
    if dtype == torch.float64:
        widen(mixtral)
    torch.manual_seed(0)
    config = mixtral.MixtralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        router_aux_loss_coef=AUXILIARY,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    theirs = mixtral.MixtralForCausalLM(config).to(dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.3)
    ours = Transformer(model_config(layers), dtype, seed=None)
    for name, parameter in ours.named_parameters():
        parameter.data.copy_(theirs.get_parameter(their_name(name)).view_as(parameter))
    return theirs, ours


def model_config(layers: int) -> ModelConfig:
    return ModelConfig(
        layers=layers,
        width=32,
        heads=4,
        kv_heads=2,
        vocabulary=50,
        attention=AttentionConfig(rope=RopeConfig(theta=500.0)),
        norm_epsilon=1e-5,
        moe=moe_config(AUXILIARY),
    )


def moe_config(balance: float) -> MoEConfig:
    return MoEConfig(experts=4, top_k=2, hidden=24, z_coefficient=0.0, balance=BalanceConfig(balance, Scope.batch))


def their_name(name: str) -> str:
    outside = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
    if name in outside:
        return outside[name]
    layers, index, rest = name.split(".", 2)
    return f"model.{layers}.{index}.{NAMES[rest]}"


def batch() -> tuple[Tensor, Tensor]:
    """Returns ids, and labels of which some are ignored. Labels are not shifted: transformers shifts them."""
    ids = torch.randint(50, (3, 11))
    return ids, ids.masked_fill(torch.rand(3, 11) < 0.2, IGNORE)


def forward(ours: Transformer, ids: Tensor, labels: Tensor, balance: float) -> tuple[Tensor, Losses]:
    """Their load-balance loss counts all tokens, so ours gets no mask."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    logits, stats = ours(ids, with_stats=True)
    totals = Totals(int((targets != IGNORE).sum()), len(ids), 1)
    summed = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    balanced = replace(ours.config.moe, balance=replace(ours.config.moe.balance, coefficient=balance))
    mesh = build_mesh(ParallelConfig())
    share = losses(summed, stats, balanced, totals, mesh)
    return logits, add_pooled_balance(share, pooled_sums(stats, balanced), balanced, totals, mesh)


def assert_same_gradients(ours: Transformer, theirs: Any, tolerance: float) -> None:
    for name, parameter in ours.named_parameters():
        expected = theirs.get_parameter(their_name(name)).grad.view_as(parameter)
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
