"""bf16 on a CPU without bf16 products: computed in fp32, rounded once, and nothing wider is saved for the backward pass."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tokenyard.moe import linear as linear_module
from tokenyard.moe.attention import Softmax, attend
from tokenyard.moe.feedforward import FeedForward
from tokenyard.moe.linear import HeadsNorm, RMSNorm, compute_dtype, linear, lists_bf16, makes_tf32
from torch import Tensor


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "MULTIPLIES_BF16", False)


def test_flags_of_processors() -> None:
    assert lists_bf16("processor : 0\nflags : avx512f avx512_bf16\n")
    assert lists_bf16("flags : amx_tile amx_bf16") and lists_bf16("Features : fp asimd bf16")
    assert not lists_bf16("flags : fma avx512f avx512_vnni")


def test_which_products_are_made_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (False, True):
        monkeypatch.setattr(linear_module, "MULTIPLIES_BF16", has)
        assert compute_dtype(torch.empty(1, dtype=torch.bfloat16)) == (torch.bfloat16 if has else torch.float32)
        assert compute_dtype(torch.empty(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16
        for dtype in (torch.float32, torch.float64):
            assert compute_dtype(torch.empty(1, dtype=dtype)) == dtype


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_rounds_once(emulated: None, bias: bool) -> None:
    """With numbers whose products and sums are exact in fp32, results and gradients are the exact ones, rounded to bf16."""
    x, weight = (torch.randint(-8, 9, shape).bfloat16().requires_grad_() for shape in ((2, 3, 40), (7, 40)))
    bias_N = torch.randint(-8, 9, (7,)).bfloat16().requires_grad_() if bias else None
    grad = torch.randint(-8, 9, (2, 3, 7)).bfloat16()
    inputs = [x, weight, *([bias_N] if bias_N is not None else [])]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y, expected = linear(x, weight, bias_N), F.linear(*wide)
    assert torch.equal(linear(x, weight), F.linear(*wide[:2]).bfloat16())
    torch.testing.assert_close(y.double(), expected, rtol=2.0**-8, atol=2.0**-8 * float(expected.detach().abs().max()))
    gradients = torch.autograd.grad(y, inputs, grad)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert torch.equal(gradient, reference.bfloat16())


def test_only_what_takes_part_has_a_gradient(emulated: None) -> None:
    x, weight = torch.randn(3, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    assert not linear(x, weight).requires_grad
    for inputs in ((x.clone().requires_grad_(), weight), (x, weight.clone().requires_grad_())):
        linear(*inputs).sum().backward()
        assert [tensor.grad is not None for tensor in inputs] == [tensor.requires_grad for tensor in inputs]


def test_nothing_wide_is_kept(emulated: None) -> None:
    x, weight = torch.randn(3, 4).bfloat16().requires_grad_(), torch.randn(5, 4).requires_grad_()
    kept: list[torch.dtype] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = linear(x, weight)
    assert y.dtype == torch.bfloat16 and kept == [torch.bfloat16] * 2


@pytest.mark.parametrize("softmax", [Softmax(0.3, None, None), Softmax(0.3, 5.0, None), Softmax(0.3, None, 4)])
def test_attention_is_that_of_fp32_rounded(emulated: None, softmax: Softmax) -> None:
    heads = [torch.randn(2, 3, 9, 8).bfloat16().requires_grad_() for _ in range(3)]
    wide = [tensor.detach().float().requires_grad_() for tensor in heads]
    same_rounded(lambda tensors: attend(*tensors, softmax), heads, wide)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
def test_compiles_in_one_piece(emulated: None) -> None:
    """Forward and backward compile, and the results are the same."""
    torch.compiler.reset()
    layer, x = FeedForward(8, 16, torch.float32), torch.randn(2, 3, 8).bfloat16().requires_grad_()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outputs = [each(x) for each in (layer, compiled)]
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(y.sum(), [x, *layer.parameters()]) for y in outputs]
    for gradient, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=2.0**-7, atol=0)


def test_a_constant_is_marked_as_torch_marks_it() -> None:
    assert vars(makes_tf32) == vars(torch.compiler.assume_constant_result(lambda: True))


def same_rounded(function: Callable[[list[Tensor]], Tensor], narrow: list[Tensor], wide: list[Tensor]) -> None:
    y, expected = function(narrow), function(wide)
    grad = torch.randn_like(y)
    assert torch.equal(y, expected.bfloat16())
    for gradient, reference in zip(
        torch.autograd.grad(y, narrow, grad), torch.autograd.grad(expected, wide, grad.float()), strict=True
    ):
        assert torch.equal(gradient, reference.bfloat16())


@pytest.mark.parametrize("kind", [RMSNorm, HeadsNorm])
def test_a_zero_centred_norm_multiplies_by_one_more(kind: type[RMSNorm | HeadsNorm]) -> None:
    """Of bf16 activations, the sum is not rounded to bf16, where 1 + 0.001 is 1."""
    shape = (2, 3, 8) if kind is RMSNorm else (2, 3, 2, 4)
    one, other = kind(8, 1e-6, torch.float32, zero_centered=True), kind(8, 1e-6, torch.float32)
    torch.nn.init.normal_(one.weight)
    other.weight.data.copy_(1 + one.weight)
    x = torch.randn(shape)
    assert torch.equal(one(x), other(x))
    one.weight.data.fill_(0.001)
    expected = x.bfloat16().float() * 1.001
    expected *= (x.bfloat16().float().square().flatten(2).mean(-1) + 1e-6).rsqrt().view(2, 3, *[1] * (len(shape) - 2))
    assert torch.equal(one(x.bfloat16()), expected.bfloat16())
