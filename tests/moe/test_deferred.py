"""Deferred gradients of weights: the same numbers, computed later, and no product of theirs in the backward pass."""

import functools
from unittest import mock

import pytest
import torch
from tokenyard.moe import experts as experts_module
from tokenyard.moe.config import AttentionConfig, AttentionKind, MLAConfig, ModelConfig, MoEConfig
from tokenyard.moe.deferred import add_weight_gradients, defer, deferred_weight_gradients
from tokenyard.moe.grouped_products import grouped_outer
from tokenyard.moe.init import initialise
from tokenyard.moe.model import Transformer
from tokenyard.moe.weight_cast import shared_casts
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LATENT = AttentionConfig(kind=AttentionKind.mla, mla=MLAConfig(q_rank=12, kv_rank=12, nope_width=8, rope_width=4, value_width=8))
MOE = MoEConfig(experts=4, hidden=16, shared_hidden=8)
CONFIG = ModelConfig(
    layers=3, width=16, heads=4, kv_heads=4, hidden=24, vocabulary=40, dense_first=1, init_std=0.3, attention=LATENT, moe=MOE
)
AT_ONCE = {"embedding.weight"}
"""The only matrix whose gradient is not deferred."""
CASES = [(torch.float64, False, 1e-12), (torch.float64, True, 1e-12), (torch.bfloat16, False, 0.03)]


def build(dtype: torch.dtype, recompute: bool) -> Transformer:
    model = Transformer(CONFIG, dtype)
    initialise(model, 0)
    for block in model.blocks if recompute else []:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model


def losses(model: Transformer) -> list[Tensor]:
    """Of two micro-batches."""
    ids_NBS = torch.randint(CONFIG.vocabulary, (2, 3, 8), generator=torch.Generator().manual_seed(1))
    return [model(ids_BS).to(model.weights).square().mean() for ids_BS in ids_NBS]


@pytest.mark.parametrize(("dtype", "recompute", "tolerance"), CASES, ids=str)
def test_the_sum_is_that_of_ordinary_backward_passes(dtype: torch.dtype, recompute: bool, tolerance: float) -> None:
    """Of two micro-batches that share casts; those of the first come after the backward pass of the second."""
    ordinary, model = build(dtype, recompute), build(dtype, recompute)
    for loss in losses(ordinary):
        loss.backward()
    products = mock.patch.object(experts_module, "grouped_outer", wraps=grouped_outer)
    with shared_casts(), deferred_weight_gradients() as deferred, products as outer:
        later = []
        for loss in losses(model):
            loss.backward()
            later.append(deferred[:])
            deferred.clear()
        matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}
        assert {name for name, parameter in matrices.items() if parameter.grad is not None} == AT_ONCE
        assert [len(gradients) for gradients in later] == [len(matrices) - len(AT_ONCE)] * 2
        assert outer.call_count == 0
        for gradients in later:
            add_weight_gradients(gradients)
            assert not gradients, "what they kept is freed"
        assert outer.call_count > 0
    for (name, parameter), other in zip(model.named_parameters(), ordinary.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype
        difference = (parameter.grad - other.grad).abs().max() / other.grad.abs().max()
        assert difference <= tolerance, (name, difference)


def test_outside_nothing_is_deferred() -> None:
    """An evaluation inside keeps nothing either; a backward pass after the end is refused."""
    model = build(torch.float64, recompute=False)
    with deferred_weight_gradients() as deferred:
        with torch.no_grad():
            losses(model)
        inside, _ = losses(model)
        assert not deferred
    with pytest.raises(AssertionError, match="after `deferred_weight_gradients`"):
        inside.backward()
    losses(model)[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_weight_of_constants_has_its_gradient_at_once() -> None:
    """No backward pass would come to a product whose input has no gradient."""
    model = build(torch.float64, recompute=False)
    projection = model.blocks[0].attention.o
    with deferred_weight_gradients() as deferred:
        projection(torch.randn(2, projection.weight.shape[1], dtype=torch.float64)).sum().backward()
        assert projection.weight.grad is not None and not deferred
        defer(projection.weight, lambda: torch.ones_like(projection.weight))
        before = projection.weight.grad.clone()
        add_weight_gradients(deferred)
    assert torch.equal(projection.weight.grad, before + 1)
