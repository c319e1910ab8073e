"""Attention of the last tokens equals the last rows of attention of all, with gradients, without a mask if causal."""

import pytest
import torch
from tokenyard.moe import attention as attention_module
from tokenyard.moe.attention import attend
from tokenyard.moe.softmax import Softmax
from torch import Tensor

LENGTH, NEW = 23, 7
SHAPES = {"grouped": (2, 8, 8), "multi-head": (4, 8, 8), "narrow values": (4, 8, 6), "one key head": (1, 6, 6)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_causal_attention_makes_no_mask(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = attention_of_all(shape, Softmax(0.4, None, None), None)
    monkeypatch.setattr(attention_module, "attention_mask", None)
    assert_last_rows(expected, shape, Softmax(0.4, None, None), None)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("softmax", [Softmax(0.4, None, 5), Softmax(0.4, 2.0, None), Softmax(0.4, 2.0, 9)], ids=str)
def test_windows_soft_caps_and_documents(softmax: Softmax, documents: bool) -> None:
    documents_BS = (torch.arange(LENGTH) // 9).repeat(2, 1) if documents else None
    assert_last_rows(attention_of_all((2, 8, 8), softmax, documents_BS), (2, 8, 8), softmax, documents_BS)


def test_bf16_is_as_close_as_in_one_piece() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 64, 16) for _ in range(3))
    expected = attend(q, k, v, Softmax(0.25, None, None))[:, :, -16:]
    found = attend(*(x.bfloat16() for x in (q[:, :, -16:], k, v)), Softmax(0.25, None, None))
    assert found.dtype == torch.bfloat16 and (found - expected).abs().max() < 0.02


def attention_of_all(shape: tuple[int, int, int], softmax: Softmax, documents_BS: Tensor | None) -> list[Tensor]:
    """Returns the last rows of the output, and the gradients of their sum with weights."""
    q, k, v, gradient = random_tensors(shape)
    y = attend(q, k, v, softmax, None, documents_BS)[:, :, -NEW:]
    return [y, *torch.autograd.grad(y, (q, k, v), gradient)]


def assert_last_rows(expected: list[Tensor], shape: tuple[int, int, int], softmax: Softmax, documents_BS: Tensor | None) -> None:
    q, k, v, gradient = random_tensors(shape)
    y = attend(q[:, :, -NEW:], k, v, softmax, None, documents_BS)
    for found, wanted in zip([y, *torch.autograd.grad(y, (q, k, v), gradient)], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def random_tensors(shape: tuple[int, int, int]) -> list[Tensor]:
    """Returns queries, keys and values, and a gradient of the last rows. `shape`: key heads, width, width of values."""
    heads, width, value = shape
    torch.manual_seed(0)
    sizes = ((4, LENGTH, width), (heads, LENGTH, width), (heads, LENGTH, value), (4, NEW, value))
    return [torch.randn(2, *size, dtype=torch.float64, requires_grad=True) for size in sizes]
