"""Attention against plain softmax over complex rotations, one head and query at a time, in fp64; and its cache."""

import math
from typing import Any

import pytest
import torch
from tokenyard.moe.attention import Attention, KeyValueCache
from tokenyard.moe.config import AttentionConfig, ModelConfig, QKNorm, RopeConfig
from tokenyard.moe.rotary import RotaryTables, rotary_tables
from torch import Tensor

CPU, WIDTH, LENGTH = torch.device("cpu"), 24, 9

HEADS = {
    "multi-head": {"heads": 4, "kv_heads": 4},
    "grouped-query": {"heads": 4, "kv_heads": 2},
    "multi-query": {"heads": 6, "kv_heads": 1},
    "wide heads": {"heads": 4, "kv_heads": 2, "head_width": 10},
}
KINDS: dict[str, dict[str, Any]] = {
    "norm of each head": {"qk_norm": QKNorm.head},
    "norm of all heads": {"qk_norm": QKNorm.full},
    "biases": {"qkv_bias": True, "output_bias": True},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window beyond the sequence": {"window": 100},
    "soft-cap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "scale": {"scale": 0.8},
    "output gate": {"output_gate": True},
    "output gate with biases": {"output_gate": True, "qkv_bias": True},
    "partial rotation": {"rope": RopeConfig(theta=100.0, fraction=0.4)},
    "interleaved rotation": {"rope": RopeConfig(theta=100.0, interleaved=True)},
    "everything": {
        "qk_norm": QKNorm.full,
        "qkv_bias": True,
        "output_bias": True,
        "window": 4,
        "softcap": 2.0,
        "sinks": True,
        "scale": 0.4,
    },
}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_heads_equal_plain_softmax(heads: dict[str, int]) -> None:
    assert_equals_plain_softmax(model_config({}, **heads))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_kinds_equal_plain_softmax(kind: dict[str, Any]) -> None:
    assert_equals_plain_softmax(model_config(kind))


@pytest.mark.parametrize("kind", [{}, *KINDS.values()], ids=["plain", *KINDS])
def test_cached_chunks_equal_the_whole_sequence(kind: dict[str, Any]) -> None:
    config = model_config(kind)
    attention = random_attention(config)
    x_BSD = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    cache, outputs, start = KeyValueCache(), [], 0
    for length in (4, 1, 3, 1):
        rotary = rotary_tables(config, start, length, CPU, torch.float64)
        outputs.append(attention(x_BSD[:, start : start + length], rotary, cache))
        start += length
        assert cache.length == start
    torch.testing.assert_close(torch.cat(outputs, 1), attention(x_BSD, turns_of(config)), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("window", "last"), [(None, 8), (3, 6)])
def test_a_token_is_seen_by_itself_and_those_after_it(window: int | None, last: int) -> None:
    config = model_config({"window": window})
    attention = random_attention(config)
    x_BSD = torch.randn(1, LENGTH, WIDTH, dtype=torch.float64)
    before = attention(x_BSD, turns_of(config))
    x_BSD[:, 4] += 1
    changed = (before - attention(x_BSD, turns_of(config)))[0].abs().amax(-1) > 1e-6
    assert changed.nonzero().flatten().tolist() == list(range(4, last + 1))


def test_which_layers_have_the_window() -> None:
    settings = AttentionConfig(window=3, window_every=3)
    windows = [Attention(ModelConfig(attention=settings), torch.float32, index).softmax.window for index in range(6)]
    assert windows == [3, 3, None, 3, 3, None]
    settings.full_layers = [0, 4]
    windows = [Attention(ModelConfig(attention=settings), torch.float32, index).softmax.window for index in range(6)]
    assert windows == [None, 3, None, 3, None, None]


@pytest.mark.parametrize("kind", [{"sinks": True}, {"softcap": 1.5}, {"qk_norm": QKNorm.full}], ids=str)
def test_bf16_stays_close_to_fp64(kind: dict[str, Any]) -> None:
    config = model_config(kind)
    wide = random_attention(config)
    narrow = Attention(config, torch.float32)
    narrow.load_state_dict(wide.state_dict())
    x_BSD = torch.randn(2, LENGTH, WIDTH)
    y_BSD = narrow(x_BSD.bfloat16(), rotary_tables(config, 0, LENGTH, CPU, torch.bfloat16))
    expected_BSD = wide(x_BSD.double(), turns_of(config))
    assert y_BSD.dtype == torch.bfloat16
    assert (y_BSD - expected_BSD).norm() < 0.02 * expected_BSD.norm()


def assert_equals_plain_softmax(config: ModelConfig) -> None:
    attention = random_attention(config)
    x_BSD = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    y_BSD = attention(x_BSD, turns_of(config))
    expected_BSD = plain_attention(attention, x_BSD, config)
    torch.testing.assert_close(y_BSD, expected_BSD, rtol=0, atol=1e-12)
    inputs = [x_BSD, *attention.parameters()]
    weight = torch.randn_like(y_BSD)
    gradients = torch.autograd.grad((y_BSD * weight).sum(), inputs)
    for gradient, expected in zip(gradients, torch.autograd.grad((expected_BSD * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-11)


def model_config(kind: dict[str, Any], **heads: Any) -> ModelConfig:
    attention = AttentionConfig(**({"rope": RopeConfig(theta=100.0)} | kind))
    return ModelConfig(**({"width": WIDTH, "heads": 4, "kv_heads": 2, "head_width": 10} | heads), attention=attention)


def random_attention(config: ModelConfig) -> Attention:
    torch.manual_seed(0)
    attention = Attention(config, torch.float64)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


def turns_of(config: ModelConfig) -> RotaryTables:
    return rotary_tables(config, 0, LENGTH, CPU, torch.float64)


def plain_attention(attention: Attention, x_BSD: Tensor, config: ModelConfig) -> Tensor:
    """Computes one sequence, head and query at a time."""
    settings = config.attention
    rows = []
    for x_SD in x_BSD:
        q, k, v = (x_SD @ p.weight.T + (0 if p.bias is None else p.bias) for p in (attention.q, attention.k, attention.v))
        q, k = normed(q, attention.q_norm, config), normed(k, attention.k_norm, config)
        heads = [plain_head(attention, head, q, k, v, config) for head in range(config.heads)]
        y_SC = torch.cat(heads, 1)
        if attention.gate is not None:
            y_SC = y_SC / (1 + (-attention.gate(x_SD)).exp())
        y_SD = y_SC @ attention.o.weight.T
        rows.append(y_SD + attention.o.bias if settings.output_bias else y_SD)
    return torch.stack(rows)


def plain_head(attention: Attention, head: int, q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    settings, width = config.attention, config.head_width or config.width // config.heads
    group = head * config.kv_heads // config.heads
    query = turned(q[:, head * width :][:, :width], settings.rope)
    key = turned(k[:, group * width :][:, :width], settings.rope)
    value = v[:, group * width :][:, :width]
    outputs = []
    for last in range(len(q)):
        seen = range(max(0, last + 1 - (settings.window or len(q))), last + 1)
        logits = torch.stack([key[s] @ query[last] * (settings.scale or 1 / math.sqrt(width)) for s in seen])
        if settings.softcap is not None:
            logits = settings.softcap * torch.tanh(logits / settings.softcap)
        total = logits.exp().sum() + (attention.sinks[head].exp() if attention.sinks is not None else 0)
        outputs.append(logits.exp() / total @ value[list(seen)])
    return torch.stack(outputs)


def normed(x_SC: Tensor, norm: Any, config: ModelConfig) -> Tensor:
    if norm is None:
        return x_SC
    parts = x_SC.split(len(norm.weight), dim=1)
    return torch.cat([p / (p.square().mean(1, keepdim=True) + config.norm_epsilon).sqrt() * norm.weight for p in parts], 1)


def turned(x_Sh: Tensor, rope: RopeConfig) -> Tensor:
    """Row s as complex numbers, times exp(j s theta**(-2i/r)) in the first r dimensions."""
    width = round(x_Sh.shape[1] * rope.fraction)
    wheel = x_Sh[:, :width]
    first, second = (wheel[:, ::2], wheel[:, 1::2]) if rope.interleaved else wheel.chunk(2, -1)
    frequencies = torch.tensor([rope.theta ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
    angles = torch.arange(len(x_Sh), dtype=torch.float64)[:, None] * frequencies
    product = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    pairs = torch.stack([product.real, product.imag], -1).flatten(1) if rope.interleaved else None
    halves = torch.cat([product.real, product.imag], -1)
    return torch.cat([halves if pairs is None else pairs, x_Sh[:, width:]], -1)
