"""Cross entropy over sliced logits, and the sliced embedding, equal torch's own on the whole vocabulary."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tokenyard.parallel import vocabulary
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import Axis, build_mesh
from tokenyard.parallel.vocabulary import VocabularyParallelEmbedding, cross_entropy_sum
from torch import Tensor

VOCABULARY, IGNORE, FACTOR = 24, -100, 0.37
CHUNK = 16
"""Tokens that are widened at once, here."""
ALONE = Axis(1, 0, None)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


class Result(NamedTuple):
    loss: Tensor
    gradient: Tensor


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vocabulary.CHUNK, "cpu", CHUNK * VOCABULARY)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("tokens", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
def test_one_rank_equals_torch(tokens: int, dtype: torch.dtype) -> None:
    logits_TV, targets_T = logits_and_targets(tokens, dtype)
    assert_same(by_us(logits_TV, targets_T, ALONE), by_torch(logits_TV, targets_T))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("world", [2, 4])
def test_slices_equal_torch(ranks: Any, world: int, dtype: torch.dtype) -> None:
    logits_TV, targets_T = logits_and_targets(CHUNK + 3, dtype)
    expected = by_torch(logits_TV, targets_T)
    parts = ranks(world, sliced, logits_TV, targets_T)
    for part in parts:
        assert torch.equal(part.loss, parts[0].loss)
    assert_same(Result(parts[0].loss, torch.cat([part.gradient for part in parts], dim=1)), expected)


def sliced(logits_TV: Tensor, targets_T: Tensor) -> Result:
    """On a rank, whose chunks are as small as here."""
    before, vocabulary.CHUNK["cpu"] = vocabulary.CHUNK["cpu"], CHUNK * VOCABULARY // 4
    try:
        return by_slices(logits_TV, targets_T)
    finally:
        vocabulary.CHUNK["cpu"] = before


def by_slices(logits_TV: Tensor, targets_T: Tensor) -> Result:
    axis = build_mesh(ParallelConfig()).everyone
    return by_us(logits_TV.chunk(axis.size, 1)[axis.rank].contiguous(), targets_T, axis)


def test_no_counted_target_costs_nothing() -> None:
    logits_TV, targets_T = logits_and_targets(9, torch.float32)
    result = by_us(logits_TV, torch.full_like(targets_T, IGNORE), ALONE)
    assert result.loss == 0 and not result.gradient.any()


def test_huge_logits_stay_finite() -> None:
    """The second token's target is 1e4 nats behind the largest logit."""
    logits_TV = torch.tensor([[1e4, 0.0, -1e4], [1e4, 0.0, -1e4]])
    result = by_us(logits_TV, torch.tensor([0, 1]), ALONE)
    assert result.loss == 1e4
    assert torch.equal(result.gradient / FACTOR, torch.tensor([[0.0, 0, 0], [1, -1, 0]]))


@pytest.mark.parametrize("world", [2, 4])
def test_embedding(ranks: Any, world: int) -> None:
    torch.manual_seed(0)
    weight_VD, ids_BS = torch.randn(VOCABULARY, 3, dtype=torch.float64), torch.randint(VOCABULARY, (2, 8))
    upstream_BSD = torch.randn(2, 8, 3, dtype=torch.float64)
    whole_VD = weight_VD.clone().requires_grad_()
    expected_BSD = F.embedding(ids_BS, whole_VD)
    expected_BSD.backward(upstream_BSD)
    parts = ranks(world, embed, weight_VD, ids_BS, upstream_BSD)
    assert torch.equal(torch.cat([output for output, _ in parts], dim=1), expected_BSD)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts]), whole_VD.grad)


def embed(weight_VD: Tensor, ids_BS: Tensor, upstream_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's slices of the output and of the weight's gradient."""
    axis = build_mesh(ParallelConfig()).everyone
    weight = torch.nn.Parameter(weight_VD.chunk(axis.size)[axis.rank].clone())
    output = VocabularyParallelEmbedding(weight, axis.rank * len(weight), axis)(ids_BS)
    output.backward(upstream_BSD.chunk(axis.size, 1)[axis.rank])
    assert weight.grad is not None
    return output.detach(), weight.grad


def logits_and_targets(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(tokens)
    targets_T = torch.randint(VOCABULARY, (tokens,))
    targets_T[torch.rand(tokens) < 0.2] = IGNORE
    return (4 * torch.randn(tokens, VOCABULARY)).to(dtype), targets_T


def by_us(logits_TV: Tensor, targets_T: Tensor, axis: Axis) -> Result:
    logits_TV = logits_TV.clone().requires_grad_()
    loss = cross_entropy_sum(logits_TV, targets_T, IGNORE, axis)
    (gradient,) = torch.autograd.grad(FACTOR * loss, logits_TV)
    return Result(loss.detach(), gradient)


def by_torch(logits_TV: Tensor, targets_T: Tensor) -> Result:
    """In fp32 or wider, as ours."""
    logits_TV = logits_TV.clone().requires_grad_()
    wide = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    loss = F.cross_entropy(wide, targets_T, reduction="sum", ignore_index=IGNORE)
    (gradient,) = torch.autograd.grad(FACTOR * loss, logits_TV)
    return Result(loss.detach(), gradient)


def assert_same(result: Result, expected: Result) -> None:
    dtype = expected.gradient.dtype
    assert result.loss.dtype == expected.loss.dtype and result.gradient.dtype == dtype
    wide = TOLERANCES[expected.loss.dtype]
    torch.testing.assert_close(result.loss, expected.loss, rtol=wide, atol=wide)
    torch.testing.assert_close(result.gradient, expected.gradient, rtol=TOLERANCES[dtype], atol=wide)
