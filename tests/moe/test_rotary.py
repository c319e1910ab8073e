"""Rotary embeddings: angles equal transformers', the rotated dimensions, and scores that depend on distance only."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenyard.moe.config import AttentionConfig, AttentionKind, MLAConfig, ModelConfig, RopeConfig, RopeScaling
from tokenyard.moe.param_shapes import rotary_width
from tokenyard.moe.rotary import RotaryTables, frequencies, logits_factor, rotary_factor, rotary_tables, rotate
from torch import Tensor

CPU = torch.device("cpu")
LONG = {"scaling": RopeScaling.yarn, "factor": 16.0, "original_length": 256}
SCALED = {
    "linear": RopeConfig(scaling=RopeScaling.linear, factor=4.0),
    "yarn": RopeConfig(**LONG),
    "yarn with a factor": RopeConfig(**LONG, attention_factor=0.7),
    "yarn of DeepSeek": RopeConfig(**LONG, mscale=1.0, mscale_all=0.7),
    "yarn with one mscale": RopeConfig(**LONG, mscale=0.7),
    "yarn of gpt-oss": RopeConfig(**LONG, truncate=False, theta=150000.0),
    "yarn, other bounds": RopeConfig(**LONG, beta_fast=8.0, beta_slow=2.0, theta=500.0),
    "yarn of one length": RopeConfig(scaling=RopeScaling.yarn, factor=1.0, original_length=64),
    "yarn, ramp of no width": RopeConfig(**LONG, beta_fast=3.0, beta_slow=3.0, truncate=False),
    "dynamic": RopeConfig(scaling=RopeScaling.dynamic, factor=2.5, original_length=100),
    "longrope": RopeConfig(scaling=RopeScaling.longrope, factor=4.0, original_length=100),
    "longrope with a factor": RopeConfig(scaling=RopeScaling.longrope, attention_factor=1.5, original_length=100),
    "longrope of one length": RopeConfig(scaling=RopeScaling.longrope, original_length=100),
    "llama3": RopeConfig(scaling=RopeScaling.llama3, factor=8.0, original_length=512, theta=500000.0),
    "llama3, other bounds": RopeConfig(
        scaling=RopeScaling.llama3, factor=8.0, original_length=128, low_frequency_factor=2.0, high_frequency_factor=3.0
    ),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("width", [64, 24])
def test_scaled_angles_are_those_of_transformers(name: str, width: int) -> None:
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    rope = replace(SCALED[name], short_factors=spread(width, 1.0), long_factors=spread(width, 3.0))
    for seen in (5, 100, 101, 3000):
        expected, factor = rope_utils.ROPE_INIT_FUNCTIONS[rope.scaling.value](their_config(rope, width), CPU, seq_len=seen)
        torch.testing.assert_close(frequencies(rope, width, CPU, seen).float(), expected, rtol=2e-6, atol=0)
        assert rotary_factor(rope) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_a_documents_angles_are_those_of_it_alone(name: str) -> None:
    rope = replace(SCALED[name], short_factors=spread(8, 1.0), long_factors=spread(8, 3.0), original_length=6)
    config, lengths = one_head(8, rope), (3, 11, 1, 6, 7)
    documents_BS = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)])[None]
    together = rotary_tables(config, 0, sum(lengths), CPU, torch.float64, documents_BS)
    assert together.cos.shape == (1, 1, sum(lengths), 4)
    alone = [rotary_tables(config, 0, length, CPU, torch.float64) for length in lengths]
    for found, each in ((together.cos, [one.cos for one in alone]), (together.sin, [one.sin for one in alone])):
        torch.testing.assert_close(found[0, 0], torch.cat(each), rtol=0, atol=1e-14)
    assert not torch.equal(alone[1].cos[:3], alone[0].cos), "a longer document has other angles"


def test_turns_carry_the_factor_of_yarn_and_nothing_else_does() -> None:
    rope = SCALED["yarn with a factor"]
    turns = rotary_tables(one_head(8, rope), 0, 5, CPU, torch.float64)
    torch.testing.assert_close(turns.cos.square() + turns.sin.square(), torch.full((5, 4), 0.49, dtype=torch.float64))
    assert rotary_factor(RopeConfig(scaling=RopeScaling.linear, factor=4.0, attention_factor=3.0)) == 1
    assert logits_factor(RopeConfig(mscale_all=1.0, factor=4.0)) == 1
    assert logits_factor(SCALED["yarn of DeepSeek"]) == pytest.approx((0.07 * math.log(16) + 1) ** 2)


def test_interleaved_is_half_of_other_dimensions() -> None:
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    turns = rotary_tables(one_head(8), 3, 5, CPU, torch.float64)
    to_halves = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    torch.testing.assert_close(rotate(x, turns, interleaved=True)[..., to_halves], rotate(x[..., to_halves], turns))


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_part_of_the_head_is_turned_as_a_head_of_that_width(interleaved: bool) -> None:
    x = torch.randn(2, 3, 5, 20, dtype=torch.float64)
    turns = rotary_tables(one_head(20, RopeConfig(fraction=0.4)), 0, 5, CPU, torch.float64)
    expected = rotate(x[..., :8], rotary_tables(one_head(8), 0, 5, CPU, torch.float64), interleaved)
    assert torch.equal(rotate(x, turns, interleaved), torch.cat([expected, x[..., 8:]], -1))


def test_rotary_width() -> None:
    assert rotary_width(ModelConfig(width=60, heads=3)) == 20
    assert rotary_width(ModelConfig(width=60, heads=3, head_width=100, attention=fraction(0.58))) == 58  # 57.99... in floats
    latent = AttentionConfig(kind=AttentionKind.mla, mla=MLAConfig(rope_width=6))
    assert rotary_width(ModelConfig(width=60, heads=3, attention=latent)) == 6


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_of_turned_heads_depend_on_the_distance_alone(interleaved: bool) -> None:
    config = one_head(8, RopeConfig(theta=50.0))
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(query_at: int, key_at: int) -> Tensor:
        return (rotate(q, turns_at(config, query_at), interleaved) * rotate(k, turns_at(config, key_at), interleaved)).sum()

    for distance in (0, 1, 5):
        expected = score(distance, 0)
        for key_at in (1, 17, 4000):
            torch.testing.assert_close(score(key_at + distance, key_at), expected, rtol=0, atol=1e-10)
    assert (score(1, 0) - score(0, 0)).abs() > 1e-3
    assert torch.equal(rotate(q, turns_at(config, 0), interleaved), q)


def test_turns_of_far_positions_are_exact_in_fp32() -> None:
    config = one_head(64)
    narrow = rotary_tables(config, 1_000_000, 3, CPU, torch.bfloat16)
    exponents = [config.attention.rope.theta ** (-2 * i / 64) for i in range(32)]
    expected = torch.tensor([[math.cos(position * f) for f in exponents] for position in range(1_000_000, 1_000_003)])
    assert narrow.cos.dtype == torch.float32
    torch.testing.assert_close(narrow.cos, expected, rtol=0, atol=1e-6)


def one_head(width: int, rope: RopeConfig | None = None) -> ModelConfig:
    return ModelConfig(width=width, heads=1, kv_heads=1, attention=AttentionConfig(rope=rope or RopeConfig()))


def spread(width: int, most: float) -> list[float]:
    """A factor for each pair, from 1 to 1 + `most`."""
    return torch.linspace(1.0, 1.0 + most, width // 2).tolist()


def fraction(value: float) -> AttentionConfig:
    return AttentionConfig(rope=RopeConfig(fraction=value))


def turns_at(config: ModelConfig, position: int) -> RotaryTables:
    return rotary_tables(config, position, 1, CPU, torch.float64)


def their_config(rope: RopeConfig, width: int) -> Any:
    """Returns the configuration that transformers' functions read."""
    parameters = {
        "rope_type": rope.scaling.value,
        "rope_theta": rope.theta,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_length,
        "attention_factor": rope.attention_factor,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "truncate": rope.truncate,
        "low_freq_factor": rope.low_frequency_factor,
        "high_freq_factor": rope.high_frequency_factor,
        "short_factor": rope.short_factors,
        "long_factor": rope.long_factors,
    }
    return SimpleNamespace(rope_parameters=parameters, head_dim=width, hidden_size=width, num_attention_heads=1,
                           max_position_embeddings=rope.original_length, standardize_rope_params=lambda: None)  # fmt: skip
