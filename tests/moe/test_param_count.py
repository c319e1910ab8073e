"""Parameters and FLOPs against numbers computed by hand, and against published numbers of known models."""

from dataclasses import fields, replace

import pytest
from tokenyard.moe.config import (
    Activation,
    AttentionConfig,
    AttentionKind,
    DeltaNetConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    QKNorm,
    RouterConfig,
    Selection,
)
from tokenyard.moe.param_count import (
    Count,
    count,
    flops_by_layer,
    flops_per_token,
    kv_cache_elements,
    part_of,
    repeated_flops_per_token,
    training_flops_per_token,
)
from tokenyard.moe.param_shapes import shapes


def small(**changes: object) -> ModelConfig:
    """Three layers (dense, MoE, MoE), every dimension different, small enough to work by hand."""
    moe = MoEConfig(experts=4, top_k=2, hidden=5, shared_hidden=3)
    settings: dict = {
        "layers": 3,
        "width": 8,
        "heads": 4,
        "kv_heads": 2,
        "hidden": 16,
        "vocabulary": 10,
        "dense_first": 1,
        "moe": moe,
    }
    return ModelConfig(**(settings | changes))


def mixtral() -> ModelConfig:
    moe = MoEConfig(experts=8, top_k=2, hidden=14336)
    return ModelConfig(layers=32, width=4096, heads=32, kv_heads=8, vocabulary=32000, moe=moe)


def test_each_part_by_hand():
    assert count(small()) == Count(
        embedding=80,  # 10 x 8
        attention=576,  # 3 layers x (q 8x8 + k 4x8 + v 4x8 + o 8x8)
        router=64,  # 2 x 4 x 8
        experts=960,  # 2 x 4 experts x 3 matrices x 8 x 5
        active_experts=480,
        shared=144,  # 2 x 3 x 8 x 3
        dense=384,  # 1 x 3 x 8 x 16
        norms=56,  # 7 x 8
        head=80,
    )
    assert count(small()).total == 80 + 576 + 64 + 960 + 144 + 384 + 56 + 80 == 2344
    assert count(small()).active == 2344 - 480


def test_mixtral_8x7b():
    parts = count(mixtral())
    assert parts.total == 46_702_792_704  # the size of the published checkpoint; "46.7B"
    assert round(parts.active / 1e9, 1) == 12.9


def test_deepseek_moe_shape():
    moe = MoEConfig(experts=64, top_k=6, hidden=1408, shared_hidden=2 * 1408)
    config = ModelConfig(layers=28, width=2048, heads=16, kv_heads=16, hidden=10944, vocabulary=102400, dense_first=1, moe=moe)
    assert round(count(config).total / 1e9, 1) == 16.4  # DeepSeekMoE 16B
    assert round(count(config).active / 1e9, 1) == 2.8


def test_tied_head_is_not_a_parameter_but_a_product():
    tied = small(tie_embeddings=True)
    assert count(tied).head == 0
    assert count(tied).total == count(small()).total - 80
    assert flops_per_token(tied, 7) == flops_per_token(small(), 7)


def test_dense_model_has_all_parameters_active():
    dense = count(small(moe=MoEConfig(experts=0)))
    assert (dense.router, dense.experts, dense.shared) == (0, 0, 0)
    assert dense.total == dense.active
    assert dense.dense == 3 * 384


def test_head_width_may_differ_from_width_over_heads():
    assert count(small(head_width=3)).attention == 3 * 2 * 8 * 3 * (4 + 2)


def test_flops_by_hand():
    weights = 576 + 64 + 480 + 144 + 384 + 80
    attention = 3 * 4 * 4 * 2 * 4  # layers x (scores and values: 4 FLOPs) x heads x head width x mean context of 7 tokens
    assert flops_per_token(small(), 7) == 2 * weights + attention
    assert training_flops_per_token(small(), 7) == 3 * (2 * weights + attention)
    assert training_flops_per_token(small(), 7, "block") == 4 * (2 * weights + attention)


def test_flops_that_selective_recomputation_repeats_by_hand():
    shared_down = 2 * 8 * 3  # layers x D x F, of rows of 3 < 8 numbers
    assert repeated_flops_per_token(small(), 7) == 2 * shared_down
    assert training_flops_per_token(small(), 7, "selective") == training_flops_per_token(small(), 7) + 2 * shared_down
    mla = MLAConfig(q_rank=6, kv_rank=4, nope_width=2, rope_width=2, value_width=3)
    latent = small(attention=AttentionConfig(kind=AttentionKind.mla, mla=mla))
    up_projections = 3 * (6 * 4 * (2 + 2) + 4 * 4 * (2 + 3))  # of queries, and of keys and values
    assert repeated_flops_per_token(latent, 7) == 2 * (shared_down + up_projections)
    windowed = small(attention=AttentionConfig(window=3))
    pairs = 1 + 2 + 3 * 7  # of 9 tokens
    assert repeated_flops_per_token(windowed, 9) == 2 * shared_down + 2 * 4 * 2 * 2 * 3 * pairs // 9


@pytest.mark.parametrize("length", [1, 2, 9])
def test_attention_flops_are_the_mean_over_positions(length: int):
    contexts = [position + 1 for position in range(length)]
    without = 2 * (count(small()).active - 80 - 56)  # all weights but embedding and norms
    mean = sum(3 * 4 * 4 * 2 * context for context in contexts) / length
    assert flops_per_token(small(), length) == without + mean


@pytest.mark.parametrize(
    "attention",
    [AttentionConfig(window=3, window_every=2), AttentionConfig(linear_every=3), AttentionConfig(linear_layers=[1])],
    ids=["window", "linear", "one linear layer"],
)
def test_flops_by_layer_are_those_of_each_layer(attention: AttentionConfig):
    """Layers of other kinds cost other amounts, and all of them with the head and the predictions are the whole."""
    config = small(attention=attention, mtp_depth=1, dense_first=0)
    layers, after = flops_by_layer(config, 9)
    assert sum(layers) + after == training_flops_per_token(config, 9) // 3
    kinds = [(config.windowed_layer(index), config.linear_layer(index)) for index in range(config.layers)]
    assert len(set(zip(kinds, layers, strict=True))) == len(set(kinds)) == len(set(layers)) == 2


def test_close_to_the_rule_of_six():
    """6 N per token (Kaplan et al. 2020) holds for short sequences, N being the active weights without the embedding."""
    parts = count(mixtral())
    assert training_flops_per_token(mixtral(), 1) == pytest.approx(6 * (parts.active - parts.embedding), rel=1e-3)


def test_latent_attention_by_hand():
    """4 heads of 6 + 2 (keys) and 5 (values), latents of 7 (queries) and 3 (keys and values), width 8."""
    mla = MLAConfig(q_rank=7, kv_rank=3, nope_width=6, rope_width=2, value_width=5)
    config = small(attention=AttentionConfig(kind=AttentionKind.mla, mla=mla))
    weights = 7 * 8 + 32 * 7 + 5 * 8 + 44 * 3 + 8 * 20
    assert count(config).attention == 3 * weights
    assert count(config).norms == 7 * 8 + 3 * (7 + 3)
    direct = small(attention=AttentionConfig(kind=AttentionKind.mla, mla=replace(mla, q_rank=None)))
    assert count(direct).attention == 3 * (weights - 7 * 8 - 32 * 7 + 32 * 8)
    assert flops_per_token(config, 7) - flops_per_token(small(), 7) == 2 * 3 * (weights - 192) + 3 * 2 * 4 * (13 - 4) * 4
    assert kv_cache_elements(config, 9) == 3 * 9 * (3 + 2)


def test_attention_extras_by_hand():
    extras = AttentionConfig(qk_norm=QKNorm.head, qkv_bias=True, output_bias=True, sinks=True)
    parts = count(small(attention=extras))
    assert parts.attention - count(small()).attention == 3 * (8 + 4 + 4 + 8 + 4)
    assert parts.norms - count(small()).norms == 3 * 2 * 2
    assert count(small(attention=AttentionConfig(qk_norm=QKNorm.full))).norms - count(small()).norms == 3 * (8 + 4)
    assert flops_per_token(small(attention=extras), 7) == flops_per_token(small(), 7)


def test_gated_delta_net_by_hand():
    """Two of three layers: 2 key heads of 3, 4 value heads of 5, 4 tokens in the convolution; 4 heads of 2 in the third."""
    delta = DeltaNetConfig(key_heads=2, value_heads=4, key_width=3, value_width=5, kernel=4)
    settings = AttentionConfig(linear_every=3, delta=delta, output_gate=True, qkv_bias=True)
    config, full = small(attention=settings), 8 * (8 + 4 + 4 + 8 + 8)
    products = 8 * (6 + 6 + 20 + 20 + 4 + 4) + 20 * 8 + 4 * (6 + 6 + 20)  # projections, output, convolutions
    assert count(config).attention == 2 * (products + 4 + 4) + full + 8 + 4 + 4 + 8
    assert count(config).norms == 7 * 8 + 2 * 5
    weights = 2 * products + full + 64 + 480 + 144 + 384 + 80
    assert flops_per_token(config, 7) == 2 * weights + 2 * (2 * 3 * 4 * 3 * 5) + 4 * 4 * 2 * 4
    assert kv_cache_elements(config, 9) == 2 * (4 * 3 * 5 + 3 * (6 + 6 + 20)) + 9 * 2 * 2 * 2
    irregular = small(attention=replace(settings, linear_every=1, linear_layers=[0, 1]))
    assert shapes(irregular) == shapes(config) and flops_per_token(irregular, 7) == flops_per_token(config, 7)
    predicting = small(attention=settings, mtp_depth=1)  # its block would be the first of the next three
    assert "mtp.0.block.attention.beta.weight" not in shapes(predicting)


def test_sandwich_norms():
    assert count(small(sandwich_norms=True)).norms == 56 + 3 * 2 * 8


def test_without_a_gate_there_are_two_matrices():
    plain = small(
        activation=Activation.relu, moe=MoEConfig(experts=4, top_k=2, hidden=5, shared_hidden=3, activation=Activation.gelu)
    )
    parts, gated = count(plain), count(small())
    assert [3 * part for part in (parts.experts, parts.shared, parts.dense)] == [
        2 * p for p in (gated.experts, gated.shared, gated.dense)
    ]


def test_moe_extras_by_hand():
    router = RouterConfig(bias=True, noise=True, null_experts=2)
    parts = count(small(moe=MoEConfig(experts=4, top_k=3, hidden=5, shared_hidden=3, shared_gate=True, bias=True, router=router)))
    assert parts.router == 2 * (6 * 8 + 6 + 6 * 8)
    assert parts.experts == 2 * 4 * (3 * 8 * 5 + 2 * 5 + 8)
    assert parts.active_experts * 6 == parts.experts * 3
    assert parts.shared == 2 * (3 * 8 * 3 + 8)


def test_noise_biases_and_null_experts_in_flops():
    """Noise and biases cost nothing; null experts take their share of the choices."""
    moe = MoEConfig(experts=4, top_k=2, hidden=5, shared_hidden=3)
    plain = flops_per_token(small(), 7)
    assert flops_per_token(small(moe=replace(moe, bias=True, router=RouterConfig(bias=True, noise=True))), 7) == plain
    null = flops_per_token(small(moe=replace(moe, router=RouterConfig(null_experts=4))), 7)
    assert null - plain == 2 * (64 - 480 // 2)


def test_a_hash_needs_no_router():
    assert count(small(moe=MoEConfig(experts=4, top_k=1, router=RouterConfig(selection=Selection.hash)))).router == 0


def test_multi_token_prediction_is_counted_apart():
    plain, ahead = small(), small(mtp_depth=2)
    block = 576 // 3 + 64 // 2 + 960 // 2 + 144 // 2 + 2 * 8
    assert count(ahead) == replace(count(plain), mtp=2 * (block + 3 * 8 + 8 * 16))
    assert count(ahead).trained == count(plain).total + count(ahead).mtp
    assert flops_per_token(ahead, 7) == flops_per_token(plain, 7)
    each = 2 * (576 // 3 + 64 // 2 + 480 // 2 + 144 // 2 + 8 * 16 + 80) + 4 * 4 * 2 * 4
    assert training_flops_per_token(ahead, 7) == 3 * (flops_per_token(plain, 7) + 2 * each)


@pytest.mark.parametrize(("every", "windowed"), [(1, 3), (2, 2), (3, 2), (4, 3)])
@pytest.mark.parametrize("length", [2, 4, 9])
def test_windows_bound_context_and_cache(every: int, windowed: int, length: int):
    config = small(attention=AttentionConfig(window=4, window_every=every))
    seen = sum(windowed * min(position + 1, 4) + (3 - windowed) * (position + 1) for position in range(length))
    without = flops_per_token(small(), 1) - 3 * 4 * 4 * 2
    assert flops_per_token(config, length) == without + 4 * 4 * 2 * seen // length
    assert kv_cache_elements(config, length) == 2 * 2 * 2 * (windowed * min(length, 4) + (3 - windowed) * length)


def test_every_part_has_its_names():
    assert {part_of(name) for name in shapes(small())} == {field.name for field in fields(Count)} - {"active_experts", "mtp"}
    assert {part_of(name) for name in shapes(small(mtp_depth=1)) if name.startswith("mtp.")} == {"mtp"}
    assert part_of("layers.0.attention.q_norm.weight") == part_of("norm.weight") == "norms"
    assert part_of("layers.0.moe.shared_gate.weight") == "shared"
