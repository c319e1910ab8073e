"""Every architecture gives the numbers of one process on every layout, in fp64: losses, counts, every gradient, weights.

What tensor parallelism slices, gathers and sums differs between them: see parallel/tensor.py.
"""

from typing import Any

import pytest
import torch
from sameness import (
    LENGTH,
    SEQUENCES,
    VOCABULARY,
    Case,
    Layout,
    assert_layout_gives_the_numbers_of_one_process,
    build,
    reference,
)
from tokenyard.moe.config import (
    Activation,
    AttentionConfig,
    AttentionKind,
    BalanceConfig,
    DeltaNetConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    QKNorm,
    RopeConfig,
    RopeScaling,
    RouterConfig,
)
from tokenyard.train.config.config import Precision

LAYOUTS = {
    "tensor 2": Layout(2, tensor=2),
    "tensor 2 x expert 2": Layout(4, tensor=2, expert=2),
    "tensor 4 x expert 4": Layout(4, tensor=4, expert=4),
    "shard 2 x expert 2": Layout(2, shard=2, expert=2),
    "tensor 2 x shard 2, recompute": Layout(4, tensor=2, shard=2, recompute=True),
}


def case(attention: AttentionConfig, moe: dict[str, Any] | None = None, micro_batches: int = 1, **model: Any) -> Case:
    balance = BalanceConfig(coefficient=0.05)
    experts = MoEConfig(**({"experts": 8, "hidden": 16, "z_coefficient": 0.01, "balance": balance} | (moe or {})))
    sizes = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 4, "hidden": 24, "vocabulary": VOCABULARY, "init_std": 0.3}
    return Case(ModelConfig(**(sizes | {"attention": attention, "moe": experts} | model)), micro_batches)


def latent(q_rank: int | None, **more: Any) -> AttentionConfig:
    rope = RopeConfig(
        interleaved=True, scaling=RopeScaling.yarn, factor=4.0, original_length=8, mscale=1.0, mscale_all=0.7, beta_fast=4.0
    )
    mla = MLAConfig(q_rank=q_rank, kv_rank=12, nope_width=6, rope_width=4, value_width=5, **more)
    return AttentionConfig(kind=AttentionKind.mla, mla=mla, rope=rope)


LONGROPE = RopeConfig(
    scaling=RopeScaling.longrope, factor=4.0, original_length=8, short_factors=[1.0, 2.0], long_factors=[1.0, 5.0]
)
CASES = {
    "mla, first layer dense": case(latent(None), dense_first=1),
    "mla with latent queries": case(latent(10), {"shared_hidden": 16}),
    "gpt-oss: sinks, alternating window, biases, clamped swiglu": case(
        AttentionConfig(sinks=True, window=3, window_every=2, qkv_bias=True, output_bias=True),
        {"activation": Activation.swiglu_clamped, "bias": True},
    ),
    "norms after attention and experts alone, residual factor": case(
        AttentionConfig(qk_norm=QKNorm.full), pre_norms=False, sandwich_norms=True, residual_multiplier=0.4
    ),
    "full-width qk norm, sandwich, soft-caps, multipliers": case(
        AttentionConfig(qk_norm=QKNorm.full, softcap=2.0, scale=0.3, rope=RopeConfig(fraction=0.5)),
        {"activation": Activation.geglu},
        sandwich_norms=True,
        embedding_multiplier=3.0,
        output_multiplier=0.5,
        output_softcap=4.0,
        dense_first=1,
        activation=Activation.relu_squared,
    ),
    "per-head qk norm, clipped, longrope, gated shared expert, tied": case(
        AttentionConfig(qk_norm=QKNorm.head, clip_qkv=0.5, rope=LONGROPE),
        {"shared_hidden": 16, "shared_gate": True},
        tie_embeddings=True,
    ),
    "multi-token prediction": case(latent(10), mtp_depth=2, mtp_coefficient=0.5, micro_batches=2),
    "gated DeltaNet and gated attention, zero-centred norms": case(
        AttentionConfig(
            qk_norm=QKNorm.head,
            output_gate=True,
            qkv_bias=True,
            linear_every=2,
            delta=DeltaNetConfig(key_heads=4, value_heads=8, key_width=3, value_width=5),
        ),
        {"shared_hidden": 16, "shared_gate": True},
        zero_centered_norms=True,
    ),
    "multi-token prediction, every second layer, tied": case(
        AttentionConfig(output_bias=True), mtp_depth=2, mtp_after_norm=True, moe_every=2, tie_embeddings=True
    ),
    "experts on a shortcut, some return the token, scaled latents": case(
        latent(10, scale_latents=True),
        {"shortcut": True, "router": RouterConfig(normalize_top_k=False, scale=2.0, null_experts=4, copy_experts=4)},
        layers=4,
        moe_every=2,
    ),
}


PAIRS = [(list(LAYOUTS)[(index + shift) % len(LAYOUTS)], name) for index, name in enumerate(CASES) for shift in (0, 2)]
"""Two layouts for each case, one of them at least with slices of heads and sequences."""


@pytest.mark.parametrize(("layout", "name"), PAIRS)
def test_layout_gives_the_numbers_of_one_process(ranks, layout: str, name: str) -> None:
    assert_layout_gives_the_numbers_of_one_process(ranks, LAYOUTS[layout], CASES[name])


def test_each_case_is_sliced_and_each_layout_tried() -> None:
    assert {name for layout, name in PAIRS if LAYOUTS[layout].tensor > 1} == set(CASES)
    assert {layout for layout, _ in PAIRS} == set(LAYOUTS)


@pytest.mark.parametrize("name", CASES)
def test_fsdp_changes_no_bit_of_bf16_logits(ranks, name: str) -> None:
    """Weights gathered in bf16 equal those that one process casts; rotary tables and routers stay wide."""
    expected = logits_in_bf16(Layout(1), CASES[name].config)
    for logits in ranks(2, logits_in_bf16, Layout(2, shard=2), CASES[name].config):
        assert logits.dtype == torch.bfloat16
        assert torch.equal(logits, expected)


def logits_in_bf16(layout: Layout, config: ModelConfig) -> torch.Tensor:
    """Returns the logits of the same rows on every rank."""
    with torch.no_grad():
        ids_BS = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
        return build(layout, config, Precision.bf16).model(ids_BS)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_worth_comparing_with(name: str) -> None:
    """Every parameter is used, and those that start at zero or one have moved."""
    expected, config = reference(CASES[name]), CASES[name].config
    idle = [parameter for parameter, gradient in expected["gradients"].items() if not gradient.abs().max() > 1e-6]
    assert not idle
    assert all((weight != weight.round()).any() for weight in expected["weights"].values())
    first = expected["steps"][0]
    assert len(first.mtp_D) == config.mtp_depth and (first.mtp_D > 0).all()
    assert len(first.counts_LE) == sum(config.moe_layer(index) for index in range(config.layers + config.mtp_depth))
    assert first.tokens < SEQUENCES * LENGTH
    assert torch.isfinite(first.gradient_norm)
