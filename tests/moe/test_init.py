"""Initial weights depend on seed and name alone."""

import math

import pytest
import torch
from tokenyard.moe.config import AttentionConfig, AttentionKind, MLAConfig, ModelConfig, MoEConfig, QKNorm
from tokenyard.moe.init import fill, initialise
from tokenyard.moe.model import Transformer
from torch import Tensor


def test_other_layers_experts_and_vocabularies_change_nothing() -> None:
    """Except for the scale of output projections, which depends on the number of layers."""
    small, large = weights(layers=2, experts=4), weights(layers=5, experts=7)
    scale = math.sqrt(5 / 2)
    for name, weight in small.items():
        if "router" in name:
            continue  # a row per expert
        other = large[name][: len(weight)]
        torch.testing.assert_close(other * scale if writes_residual(name) else other, weight)
    assert len(large) > len(small)


def test_seeds_and_names_differ() -> None:
    first, second = weights(seed=1), weights(seed=2)
    drawn = {name: weight for name, weight in first.items() if "norm" not in name}
    assert all((weight != second[name]).float().mean() > 0.99 for name, weight in drawn.items())
    q = [name for name in drawn if name.endswith("attention.q.weight")]
    assert len(q) == 2 and (drawn[q[0]] != drawn[q[1]]).float().mean() > 0.99
    experts = drawn["layers.0.moe.experts.down"]
    assert all((experts[a] != experts[b]).float().mean() > 0.99 for a in range(4) for b in range(a))


def test_same_seed_same_bits_in_every_precision() -> None:
    expected = weights()
    for precision in (torch.float64, torch.bfloat16):
        for name, weight in weights(precision=precision).items():
            assert torch.equal(weight, expected[name].to(weight.dtype)), name
            assert weight.dtype == (torch.float64 if precision == torch.float64 else torch.float32)


def test_standard_deviations_are_those_of_the_config() -> None:
    """Within 5 standard errors; norms are ones."""
    for name, weight in weights(width=64, hidden=96).items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
            continue
        std = 0.05 / (math.sqrt(2 * 2) if writes_residual(name) else 1)
        error = std / math.sqrt(weight.numel())
        assert abs(weight.mean().item()) < 5 * error, name
        assert abs(weight.std().item() - std) < 5 * error / math.sqrt(2), name


def test_a_rank_makes_the_part_it_holds() -> None:
    """Fills the middle columns of experts 2 and 3."""
    config, name = ModelConfig(init_std=0.05), "layers.0.moe.experts.down"
    whole, part = torch.empty(4, 6, 8), torch.empty(2, 6, 3)
    fill(whole, name, (4, 6, 8), config, 1)
    fill(part, name, (4, 6, 8), config, 1, (2, 0, 2))
    assert torch.equal(part, whole[2:4, :, 2:5])


GPT_OSS = AttentionConfig(sinks=True, qkv_bias=True, output_bias=True, qk_norm=QKNorm.full)
LINEAR = AttentionConfig(linear_layers=[0, 1], output_gate=True, qk_norm=QKNorm.full)
LATENT = AttentionConfig(kind=AttentionKind.mla, mla=MLAConfig(q_rank=8, kv_rank=8))


@pytest.mark.parametrize("attention", [GPT_OSS, LATENT, LINEAR])
def test_norms_are_ones_biases_and_sinks_zeros_and_all_else_is_drawn(attention: AttentionConfig) -> None:
    """Every parameter of the model is overwritten."""
    sizes = {"layers": 3, "width": 16, "heads": 2, "kv_heads": 1, "hidden": 8, "vocabulary": 30, "dense_first": 1}
    moe = MoEConfig(experts=2, hidden=8, shared_hidden=8, shared_gate=True, bias=True)
    model = Transformer(ModelConfig(**sizes, attention=attention, moe=moe, sandwich_norms=True, mtp_depth=1))
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    initialise(model, 1)
    for name, parameter in model.named_parameters():
        values = set(parameter.unique().tolist())
        if name.endswith((".dt_bias", ".a_log", "_conv.weight")):
            assert len(values) > 1 and parameter.isfinite().all(), name  # test_delta_net.py has their distributions
            continue
        kind = "norm" if "norm" in name else "zero" if "bias" in name or "sinks" in name else "drawn"
        assert values == {"norm": {1.0}, "zero": {0.0}}.get(kind, values), name
        assert kind != "drawn" or (len(values) > 1 and parameter.abs().max() < 0.2), name


def test_norms_that_add_one_begin_with_zeros() -> None:
    model = Transformer(ModelConfig(layers=2, attention=LINEAR, zero_centered_norms=True, mtp_depth=1))
    initialise(model, 1)
    norms = {name: parameter for name, parameter in model.named_parameters() if "norm" in name}
    gated = {name for name in norms if name.endswith("attention.output_norm.weight")}
    assert len(gated) == 2
    assert all(torch.equal(norm, torch.full_like(norm, name in gated)) for name, norm in norms.items())


def weights(
    seed: int = 1,
    layers: int = 2,
    experts: int = 4,
    width: int = 16,
    hidden: int = 24,
    precision: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    moe = MoEConfig(experts=experts, hidden=hidden, shared_hidden=hidden)
    config = ModelConfig(layers=layers, width=width, heads=2, kv_heads=1, vocabulary=64, init_std=0.05, moe=moe)
    model = Transformer(config, precision)
    initialise(model, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def writes_residual(name: str) -> bool:
    return name.endswith(("attention.o.weight", "experts.down", "shared.down"))
