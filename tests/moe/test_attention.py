"""Attention against plain softmax over complex rotations, in fp64."""

import math

import pytest
import torch
from tokenyard.moe.attention import Attention, KeyValueCache, Turns, rotary_turns, rotate
from tokenyard.moe.config import ModelConfig
from torch import Tensor

CPU = torch.device("cpu")


@pytest.mark.parametrize(("heads", "kv_heads", "head_width"), [(4, 4, None), (4, 2, None), (6, 1, None), (4, 2, 10)])
def test_equals_plain_softmax(heads: int, kv_heads: int, head_width: int | None) -> None:
    config = ModelConfig(width=24, heads=heads, kv_heads=kv_heads, head_width=head_width, rope_theta=100.0)
    attention = random_attention(config)
    x_BSD = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    y_BSD = attention(x_BSD, turns_of(config, 7))
    expected_BSD = plain_attention(attention, x_BSD, config)
    torch.testing.assert_close(y_BSD, expected_BSD, rtol=0, atol=1e-12)
    inputs = [x_BSD, *attention.parameters()]
    weight = torch.randn_like(y_BSD)
    gradients = torch.autograd.grad((y_BSD * weight).sum(), inputs)
    for gradient, expected in zip(gradients, torch.autograd.grad((expected_BSD * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-11)


def test_a_token_sees_none_after_it() -> None:
    config = ModelConfig(width=16, heads=4, kv_heads=2)
    attention = random_attention(config)
    x_BSD = torch.randn(1, 6, 16, dtype=torch.float64)
    before = attention(x_BSD, turns_of(config, 6))
    x_BSD[:, 4] += 1
    after = attention(x_BSD, turns_of(config, 6))
    assert torch.equal(before[:, :4], after[:, :4])
    assert ((before - after)[:, 4:].abs().amax(-1) > 1e-3).all()


def test_cached_chunks_equal_the_whole_sequence() -> None:
    config = ModelConfig(width=16, heads=4, kv_heads=2)
    attention = random_attention(config)
    x_BSD = torch.randn(2, 9, 16, dtype=torch.float64)
    cache, outputs, start = KeyValueCache(), [], 0
    for length in (4, 1, 3, 1):
        turns = rotary_turns(config, start, length, CPU, torch.float64)
        outputs.append(attention(x_BSD[:, start : start + length], turns, cache))
        start += length
        assert cache.length == start
    torch.testing.assert_close(torch.cat(outputs, 1), attention(x_BSD, turns_of(config, 9)), rtol=0, atol=1e-13)


def test_scores_of_turned_heads_depend_on_the_distance_alone() -> None:
    config = ModelConfig(width=8, heads=1, kv_heads=1, rope_theta=50.0)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(query_at: int, key_at: int) -> Tensor:
        return (rotate(q, turns_at(config, query_at)) * rotate(k, turns_at(config, key_at))).sum()

    for distance in (0, 1, 5):
        expected = score(distance, 0)
        for key_at in (1, 17, 4000):
            torch.testing.assert_close(score(key_at + distance, key_at), expected, rtol=0, atol=1e-10)
    assert (score(1, 0) - score(0, 0)).abs() > 1e-3
    assert torch.equal(rotate(q, turns_at(config, 0)), q)


def test_turns_of_far_positions_are_exact_in_fp32() -> None:
    config = ModelConfig(width=64, heads=1, kv_heads=1)
    narrow = rotary_turns(config, 1_000_000, 3, CPU, torch.bfloat16)
    exponents = [config.rope_theta ** (-2 * i / 64) for i in range(32)]
    expected = torch.tensor([[math.cos(position * f) for f in exponents] for position in range(1_000_000, 1_000_003)])
    assert narrow.cos.dtype == torch.float32
    torch.testing.assert_close(narrow.cos, expected, rtol=0, atol=1e-6)


def random_attention(config: ModelConfig) -> Attention:
    torch.manual_seed(0)
    attention = Attention(config, torch.float64)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


def turns_of(config: ModelConfig, length: int) -> Turns:
    return rotary_turns(config, 0, length, CPU, torch.float64)


def turns_at(config: ModelConfig, position: int) -> Turns:
    return rotary_turns(config, position, 1, CPU, torch.float64)


def plain_attention(attention: Attention, x_BSD: Tensor, config: ModelConfig) -> Tensor:
    """One sequence, head and query at a time."""
    width = config.head_width or config.width // config.heads
    rows = []
    for x_SD in x_BSD:
        q, k, v = (x_SD @ p.weight.T for p in (attention.q, attention.k, attention.v))
        heads = []
        for head in range(config.heads):
            group = head * config.kv_heads // config.heads
            query = turned(q[:, head * width :][:, :width], config.rope_theta)
            key = turned(k[:, group * width :][:, :width], config.rope_theta)
            value = v[:, group * width :][:, :width]
            scores = [(key[: s + 1] @ query[s] / math.sqrt(width)).softmax(0) for s in range(len(x_SD))]
            heads.append(torch.stack([p @ value[: len(p)] for p in scores]))
        rows.append(torch.cat(heads, 1) @ attention.o.weight.T)
    return torch.stack(rows)


def turned(x_Sh: Tensor, theta: float) -> Tensor:
    """Row s as complex numbers x[i] + j x[i + h/2], times exp(j s theta**(-2i/h))."""
    first, second = x_Sh.chunk(2, -1)
    pairs = first.shape[1]
    frequencies = torch.tensor([theta ** (-i / pairs) for i in range(pairs)], dtype=torch.float64)
    angles = torch.arange(len(x_Sh), dtype=torch.float64)[:, None] * frequencies
    product = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([product.real, product.imag], -1)
