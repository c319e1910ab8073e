"""Latent attention equals transformers' DeepSeek-V3: outputs and gradients in fp64; and its cache holds the latent alone."""

from typing import Any

import pytest
import torch
from tokenyard.moe.attention import KeyValueCache, LatentAttention
from tokenyard.moe.config import AttentionConfig, AttentionKind, MLAConfig, ModelConfig, RopeConfig, RopeScaling
from tokenyard.moe.rotary import RotaryTables, rotary_tables

WIDTH, HEADS, LENGTH = 24, 3, 9
NAMES = {"q": "q_proj", "q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj", "o": "o_proj"}
NAMES |= {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj"}


@pytest.mark.parametrize("q_rank", [None, 10])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("yarn", [False, True])
def test_same_outputs_and_gradients_as_deepseek_v3(q_rank: int | None, interleaved: bool, yarn: bool, widen) -> None:
    theirs_in = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    widen(theirs_in, pytest.importorskip("transformers.modeling_rope_utils"))
    config = model_config(q_rank, interleaved, yarn)
    ours, theirs = random_attention(config), their_attention(theirs_in, config)
    for name, parameter in ours.named_parameters():
        theirs.get_parameter(their_name(name)).data.copy_(parameter)
    x_BSD = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    y_BSD = ours(x_BSD, turns_of(config, 0, LENGTH))
    rotary = theirs_in.DeepseekV3RotaryEmbedding(theirs.config).double()(x_BSD, torch.arange(LENGTH)[None])
    hidden = torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1)
    expected_BSD, _ = theirs(x_BSD, position_embeddings=rotary, attention_mask=hidden)
    torch.testing.assert_close(y_BSD, expected_BSD, rtol=0, atol=1e-10)
    weight = torch.randn_like(y_BSD)
    parameters = dict(ours.named_parameters())
    gradients = torch.autograd.grad((y_BSD * weight).sum(), [x_BSD, *parameters.values()])
    inputs = [x_BSD, *(theirs.get_parameter(their_name(name)) for name in parameters)]
    for gradient, expected in zip(gradients, torch.autograd.grad((expected_BSD * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_cached_chunks_equal_the_whole_sequence(window: int | None, softcap: float | None) -> None:
    config = model_config(10, True, True, window=window, softcap=softcap)
    attention = random_attention(config)
    x_BSD = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    cache, outputs, start = KeyValueCache(), [], 0
    for length in (4, 1, 3, 1):
        outputs.append(attention(x_BSD[:, start : start + length], turns_of(config, start, length), cache))
        start += length
    torch.testing.assert_close(torch.cat(outputs, 1), attention(x_BSD, turns_of(config, 0, LENGTH)), rtol=0, atol=1e-13)
    assert cache.keys is not None and cache.values is not None
    assert cache.keys.shape == (2, 1, LENGTH, 4) and cache.values.shape == (2, 1, LENGTH, 12)


def test_window_and_scale_change_the_outputs_as_they_should() -> None:
    """Token 4 attends to tokens 2 to 4; with a scale of 0 the output is the mean of the values."""
    config = model_config(None, False, False, window=3)
    attention, x_BSD = random_attention(config), torch.randn(1, LENGTH, WIDTH, dtype=torch.float64)
    before = attention(x_BSD, turns_of(config, 0, LENGTH))
    x_BSD[:, 1] += 1
    changed = (attention(x_BSD, turns_of(config, 0, LENGTH)) - before).abs().amax(-1)[0] > 0
    assert changed.tolist() == [False, True, True, True, False, False, False, False, False]
    flat = attention.softmax._replace(scale=0.0, window=None)
    attention.softmax = flat
    means = attention(x_BSD, turns_of(config, 0, LENGTH))
    attention.softmax = flat._replace(window=1)
    values = attention(x_BSD, turns_of(config, 0, LENGTH))
    torch.testing.assert_close(means, values.cumsum(1) / torch.arange(1, LENGTH + 1)[:, None])


def model_config(q_rank: int | None, interleaved: bool, yarn: bool, **changes: Any) -> ModelConfig:
    rope = RopeConfig(theta=100.0, interleaved=interleaved)
    if yarn:
        rope = RopeConfig(
            theta=100.0, interleaved=interleaved, scaling=RopeScaling.yarn, factor=8.0, original_length=8, beta_fast=3.0,
            mscale=1.0, mscale_all=0.7,
        )  # fmt: skip
    mla = MLAConfig(q_rank=q_rank, kv_rank=12, nope_width=6, rope_width=4, value_width=7)
    attention = AttentionConfig(kind=AttentionKind.mla, rope=rope, mla=mla, **changes)
    return ModelConfig(width=WIDTH, heads=HEADS, attention=attention, norm_epsilon=1e-6)


def random_attention(config: ModelConfig) -> LatentAttention:
    torch.manual_seed(0)
    attention = LatentAttention(config, torch.float64)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


def their_attention(module: Any, config: ModelConfig) -> Any:
    mla, rope = config.attention.mla, config.attention.rope
    parameters = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling is RopeScaling.yarn:
        parameters |= {"rope_type": "yarn", "factor": rope.factor, "original_max_position_embeddings": rope.original_length}
        parameters |= {"beta_fast": rope.beta_fast, "mscale": rope.mscale, "mscale_all_dim": rope.mscale_all}
    theirs = module.DeepseekV3Config(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=mla.q_rank,
        kv_lora_rank=mla.kv_rank,
        qk_nope_head_dim=mla.nope_width,
        qk_rope_head_dim=mla.rope_width,
        v_head_dim=mla.value_width,
        head_dim=mla.rope_width,
        rope_parameters=parameters,
        rope_interleave=rope.interleaved,
        attn_implementation="eager",
        max_position_embeddings=64,
    )
    return module.DeepseekV3Attention(theirs, 0).double().eval()


def their_name(name: str) -> str:
    module, _, kind = name.partition(".")
    return f"{NAMES[module]}.{kind}"


def turns_of(config: ModelConfig, start: int, length: int) -> RotaryTables:
    return rotary_tables(config, start, length, torch.device("cpu"), torch.float64)
