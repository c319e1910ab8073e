"""The head's loss by chunks and by slices, and the sliced embedding, equal torch's own on the whole vocabulary."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tokenyard.moe.linear import compute_dtype
from tokenyard.moe.model import LMHead
from tokenyard.parallel import vocabulary
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import Axis, build_mesh
from tokenyard.parallel.vocabulary import VocabularyParallelEmbedding, cross_entropy, head_loss
from torch import Tensor

VOCABULARY, WIDTH, IGNORE, FACTOR = 24, 6, -100, 0.37
CHUNK = 16
"""Tokens whose logits exist at once, here."""
ALONE = Axis(1, 0, None)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
SHAPES = {"plain": (1.0, None), "multiplied": (0.5, None), "capped": (1.0, 3.0), "both": (0.5, 3.0)}
"""Multiplier and soft cap of the logits."""


class Result(NamedTuple):
    loss: Tensor
    gradient_x: Tensor
    gradient_weight: Tensor


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vocabulary.LOGITS, "cpu", CHUNK * VOCABULARY)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("tokens", [0, 1, CHUNK, 2 * CHUNK + 7])
def test_one_rank_equals_torch(tokens: int, dtype: torch.dtype, shape: str) -> None:
    inputs = random_inputs(tokens, dtype)
    assert_same(by_us(*inputs, shape, ALONE), by_torch(*inputs, shape))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("world", [2, 4])
def test_slices_equal_torch(ranks: Any, world: int, dtype: torch.dtype) -> None:
    inputs = random_inputs(CHUNK + 3, dtype)
    parts = ranks(world, sliced, *inputs)
    assert all(torch.equal(part.loss, parts[0].loss) for part in parts)
    gradient_x = torch.stack([part.gradient_x.to(parts[0].loss.dtype) for part in parts]).sum(0).to(dtype)
    gradient_weight = torch.cat([part.gradient_weight for part in parts])
    assert_same(Result(parts[0].loss, gradient_x, gradient_weight), by_torch(*inputs, "both"))


def sliced(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Result:
    """Runs on a rank, with chunks as small as here."""
    before, vocabulary.LOGITS["cpu"] = vocabulary.LOGITS["cpu"], CHUNK * VOCABULARY // 4
    try:
        axis = build_mesh(ParallelConfig()).everyone
        return by_us(x_TD, weight_VD.chunk(axis.size)[axis.rank].contiguous(), targets_T, "both", axis)
    finally:
        vocabulary.LOGITS["cpu"] = before


def test_bf16_activations_give_the_gradient_of_fp32_weights_in_fp32() -> None:
    x_TD, weight_VD, targets_T = random_inputs(CHUNK + 3, torch.bfloat16)
    result = by_us(x_TD, weight_VD.float(), targets_T, "plain", ALONE)
    assert result.gradient_weight.dtype == torch.float32
    torch.testing.assert_close(
        result.gradient_weight, by_us(x_TD, weight_VD, targets_T, "plain", ALONE).gradient_weight.float(), rtol=1e-2, atol=1e-2
    )


def test_nothing_is_differentiated_where_nobody_asks() -> None:
    x_TD, weight_VD, targets_T = random_inputs(9, torch.float64)
    head = head_of("plain")
    head.to_logits_backward = lambda *_: pytest.fail("a gradient was made")
    with torch.no_grad():
        loss = head_loss(x_TD, weight_VD.requires_grad_(), head, targets_T, IGNORE, ALONE)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, by_torch(x_TD, weight_VD.detach(), targets_T, "plain").loss)


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_the_backward_pass_makes_no_copy_in_the_wide_type(dtype: torch.dtype, copies: float) -> None:
    """Uses the weight three times, as with two modules of multi-token prediction; the gradients are added up in place.

    Narrow weights get narrow gradients: two of them, each half as large, are there while they are added up.
    """
    rows, columns = 4096, 64
    weight_VD = torch.randn(rows, columns, dtype=dtype, requires_grad=True)
    x_TD, targets_T, head = torch.randn(2, columns, dtype=dtype), torch.tensor([3, 5]), head_of("plain")
    losses = [factor * head_loss(x_TD, weight_VD, head, targets_T, IGNORE, ALONE) for factor in (1, 2, 3)]
    assert peak_bytes(torch.stack(losses).sum().backward) / (4 * rows * columns) == pytest.approx(copies, abs=0.1)


def peak_bytes(work: Callable[[], Any]) -> int:
    """Returns the peak memory of tensors that `work` creates. (With a dispatch mode, autograd adds out of place.)"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
        work()
    events: Any = profile.profiler
    changes = [event.nbytes() for event in events.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


def test_no_counted_target_costs_nothing() -> None:
    x_TD, weight_VD, targets_T = random_inputs(9, torch.float32)
    result = by_us(x_TD, weight_VD, torch.full_like(targets_T, IGNORE), "plain", ALONE)
    assert result.loss == 0 and not result.gradient_x.any() and not result.gradient_weight.any()


def test_huge_logits_stay_finite() -> None:
    """The target of the second token is 1e4 nats below the largest logit."""
    logits_TV = torch.tensor([[1e4, 0.0, -1e4], [1e4, 0.0, -1e4]])
    loss, gradient_TV = cross_entropy(logits_TV, torch.tensor([0, 1]), IGNORE, ALONE)
    assert loss == 1e4
    assert torch.equal(gradient_TV, torch.tensor([[0.0, 0, 0], [1, -1, 0]]))


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
    """Returns this rank's slices of the output and of the weight's gradient."""
    axis = build_mesh(ParallelConfig()).everyone
    weight = torch.nn.Parameter(weight_VD.chunk(axis.size)[axis.rank].clone())
    output = VocabularyParallelEmbedding(weight, axis.rank * len(weight), axis)(ids_BS)
    output.backward(upstream_BSD.chunk(axis.size, 1)[axis.rank])
    assert weight.grad is not None
    return output.detach(), weight.grad


def random_inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    targets_T = torch.randint(VOCABULARY, (tokens,))
    targets_T[torch.rand(tokens) < 0.2] = IGNORE
    return torch.randn(tokens, WIDTH).to(dtype), torch.randn(VOCABULARY, WIDTH).to(dtype), targets_T


def head_of(shape: str) -> LMHead:
    return LMHead(WIDTH, VOCABULARY, torch.float32, None, *SHAPES[shape])


def by_us(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, shape: str, axis: Axis) -> Result:
    x_TD, weight_VD = x_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    loss = head_loss(x_TD, weight_VD, head_of(shape), targets_T, IGNORE, axis)
    return Result(loss.detach(), *torch.autograd.grad(FACTOR * loss, (x_TD, weight_VD)))


def by_torch(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, shape: str) -> Result:
    """Computes in fp32 or wider after the products, as ours does; the products in the dtype that this CPU uses."""
    x_TD, weight_VD = x_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    x_AD, weight_AD = (tensor.to(compute_dtype(tensor)) for tensor in (x_TD, weight_VD))
    logits_TV = head_of(shape).to_logits(x_AD @ weight_AD.T)
    wide_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    loss = F.cross_entropy(wide_TV, targets_T, reduction="sum", ignore_index=IGNORE)
    return Result(loss.detach(), *torch.autograd.grad(FACTOR * loss, (x_TD, weight_VD)))


def assert_same(result: Result, expected: Result) -> None:
    for mine, theirs in zip(result, expected, strict=True):
        assert mine.dtype == theirs.dtype
        tolerance = TOLERANCES[theirs.dtype]
        scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * scale)
