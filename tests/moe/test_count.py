"""Parameters and FLOPs against numbers worked by hand and against those that the makers of known models publish."""

import pytest
from tokenyard.moe.config import ModelConfig, MoEConfig
from tokenyard.moe.count import Count, count, flops_per_token, training_flops_per_token


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
    assert training_flops_per_token(small(), 7, recompute=True) == 4 * (2 * weights + attention)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_attention_flops_are_the_mean_over_positions(length: int):
    contexts = [position + 1 for position in range(length)]
    without = 2 * (count(small()).active - 80 - 56)  # all weights but embedding and norms
    mean = sum(3 * 4 * 4 * 2 * context for context in contexts) / length
    assert flops_per_token(small(), length) == without + mean


def test_close_to_the_rule_of_six():
    """6 N per token (Kaplan et al. 2020) holds for short sequences, N being the active weights without the embedding."""
    parts = count(mixtral())
    assert training_flops_per_token(mixtral(), 1) == pytest.approx(6 * (parts.active - parts.embedding), rel=1e-3)
