"""FP8: what is rounded, how accurate products are, their gradients, torch's kernels by a double, and tokens as bytes."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenyard.bench.host_reads import host_reads
from tokenyard.moe import fp8
from tokenyard.moe.config import ModelConfig, MoEConfig, Products
from tokenyard.moe.device import dry_run
from tokenyard.moe.experts import Experts
from tokenyard.moe.feedforward import activate
from tokenyard.moe.fp8 import BLOCKS, TOKENS, Blocks, pack_tokens, product, rounded, scaled, unpack_tokens
from tokenyard.moe.layer import MoELayer
from tokenyard.moe.linear import linear
from tokenyard.moe.model import Block, Transformer
from torch import Tensor

NARROW = [products for products in Products if products is not Products.wide]
NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
"""All numbers of e4m3."""


def by_loop(x: Tensor, blocks: Blocks) -> Tensor:
    """Rounds a matrix block by block, by the nearest of all numbers of e4m3."""
    rounded = torch.empty_like(x)
    rows, columns = blocks.rows, blocks.columns or x.shape[1]
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            block = x[i : i + rows, j : j + columns]
            scale = float(torch.tensor(float(block.abs().max()), dtype=torch.float32) / 448)
            scale = scale or 1.0
            if blocks.power_of_two:
                scale = 2.0 ** math.ceil(math.log2(scale))
            known = NUMBERS[NUMBERS.isfinite()] * scale
            rounded[i : i + rows, j : j + columns] = known[(block.unsqueeze(-1) - known).abs().argmin(-1)]
    return rounded


@pytest.mark.parametrize("blocks", [*dict.fromkeys(each for pair in BLOCKS.values() for each in pair), TOKENS], ids=str)
def test_every_number_becomes_the_nearest_one_with_the_scale_of_its_block(blocks: Blocks) -> None:
    x = torch.randn(150, 200, dtype=torch.float64) * torch.logspace(-6, 6, 150, dtype=torch.float64)[:, None]
    x[:, 7] *= 60
    assert_nearest(x, blocks)
    assert torch.equal(rounded(torch.stack([x, 2 * x]), blocks)[1], rounded(2 * x, blocks))
    assert not rounded(torch.zeros(3, 200), blocks).any() and rounded(x[:0], blocks).shape == (0, 200)


def assert_nearest(x: Tensor, blocks: Blocks) -> None:
    """Of two numbers as near, either; on a CPU torch rounds fp64 to fp32 first."""
    found, expected = rounded(x, blocks).double(), by_loop(x.double(), blocks)
    assert ((found - x).abs() <= (expected - x).abs() * (1 + 1e-5)).all()
    assert x.dtype == torch.bfloat16 or (found != expected).sum() <= 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("blocks", [Blocks(1), fp8.MX, TOKENS], ids=str)
def test_a_number_that_is_not_finite_spoils_its_block_and_no_other(blocks: Blocks, bad: float) -> None:
    x = torch.randn(3, 256)
    x[1, 5] = bad
    spoiled = torch.zeros(3, 256, dtype=torch.bool)
    spoiled[1, : blocks.columns] = True
    assert torch.equal(rounded(x, blocks).isnan(), spoiled)
    assert torch.equal(unpack_tokens(pack_tokens(x), 256, x.dtype).isnan(), rounded(x, TOKENS).isnan())


@pytest.mark.parametrize("products", NARROW)
def test_products_and_gradients_are_those_of_rounded_operands(products: Products) -> None:
    """The gradient of a weight is that of operands that are not rounded."""
    torch.manual_seed(0)
    rows_RK, weights_ENK = torch.randn(9, 160, dtype=torch.float64), torch.randn(3, 96, 160, dtype=torch.float64)
    ends_E, (of_rows, of_weights) = torch.tensor([4, 4, 9], dtype=torch.int32), BLOCKS[products]
    found = product(products, rows_RK, weights_ENK, ends_E)
    weights = by_loop(weights_ENK[0], of_weights), None, by_loop(weights_ENK[2], of_weights)
    rows = by_loop(rows_RK, of_rows)
    expected = torch.cat([rows[:4] @ weights[0].T, rows[4:] @ weights[2].T])  # pyright: ignore[reportOptionalMemberAccess]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    x, weight, grad = rows_RK.clone().requires_grad_(), weights_ENK[0].clone().requires_grad_(), torch.randn(9, 96).double()
    y = linear(x, weight, products=products)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    torch.testing.assert_close(y, rows @ weights[0].T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_x, by_loop(grad, of_rows) @ by_loop(weights_ENK[0].T, of_weights).T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_weight, grad.T @ rows_RK, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("products", NARROW)
def test_experts_are_a_loop_over_experts(products: Products) -> None:
    """Outputs and all gradients."""
    torch.manual_seed(0)
    experts = Experts(3, 128, 64, torch.float64, products=products, bias=True)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_RD, grad_RD, sizes = torch.randn(9, 128).double().requires_grad_(), torch.randn(9, 128).double(), [4, 0, 5]
    assert experts.gate_up_bias is not None and experts.down_bias is not None
    parts = zip(x_RD.split(sizes), experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias, strict=True)
    outputs = []
    for rows, gate_up, down, gate_up_bias, down_bias in parts:
        hidden = activate(experts.activation, linear(rows, gate_up.flatten(0, 1), gate_up_bias.flatten(), products))
        outputs.append(linear(hidden, down, down_bias, products))
    expected, found = torch.cat(outputs), experts(x_RD, torch.tensor(sizes))
    inputs = [x_RD, *experts.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients, references = (torch.autograd.grad(y_RD, inputs, grad_RD) for y_RD in (found, expected))
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


def test_no_other_power_of_two_is_nearer_than_the_scale_of_mxfp8() -> None:
    """Half of it cuts off the largest number. Twice it rounds to the same numbers, but for the smallest: 4 bits are 4 bits."""
    x = torch.randn(64, 320, dtype=torch.float64)
    x[:, 7] *= 60
    _, scales = scaled(x, fp8.MX)
    each = scales.double().repeat_interleave(32, 1)
    found = {f: (x / (f * each)).clamp(-448, 448).to(torch.float8_e4m3fn).double() * f * each for f in (0.5, 1, 2)}
    assert torch.equal(found[1], rounded(x, fp8.MX))
    normal = x.abs() > 2 * each * 2.0**-6
    assert torch.equal(found[1][normal], found[2][normal]) and normal.double().mean() > 0.99
    errors = {factor: (numbers - x).square().sum() for factor, numbers in found.items()}
    assert errors[1] <= errors[2] < 1.01 * errors[1] < 5 * errors[1] < errors[0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products", NARROW)
def test_signal_to_quantisation_noise(products: Products, dtype: torch.dtype) -> None:
    """Of a layer whose input has an outlier channel, 60 times the others; in dB. That of bf16 alone is about 45.

    Gradients of weights are wide products of what products in FP8 made, and have its error. With the scales of mxfp8 the outlier
    is rounded, which all outputs of its token see alike (docs/architecture.md).
    """
    wide, narrow = layer_results(Products.wide, torch.float32), layer_results(products, dtype)
    ratio = {name: 10 * math.log10(wide[name].square().sum() / (narrow[name] - wide[name]).square().sum()) for name in wide}
    rounding = 0 if dtype == torch.float32 else 0.5
    least, weights = (22 - rounding, 23 - rounding) if products is Products.mxfp8 else (24 - rounding, 26 - rounding)
    assert min(ratio["y"], ratio["x"]) >= least, ratio
    assert min(value for name, value in ratio.items() if "experts" in name) >= weights, ratio
    assert ratio["router.weight"] >= weights and max(ratio.values()) < 40, ratio


def layer_results(products: Products, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    layer = MoELayer(
        ModelConfig(layers=1, width=512, heads=4, moe=MoEConfig(experts=8, top_k=2, hidden=256, products=products)), torch.float32
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x_BSD, grad_BSD = torch.randn(2, 128, 512), torch.randn(2, 128, 512)
    x_BSD[..., 7] *= 60
    x = x_BSD.to(torch.bfloat16).to(dtype).requires_grad_()
    y, _ = layer(x)
    y.backward(grad_BSD.to(dtype))
    assert x.grad is not None
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    return {"y": y.detach().float(), "x": x.grad.float(), **gradients}


def test_the_host_waits_for_nothing() -> None:
    experts = Experts(3, 128, 256, torch.float32, products=Products.fp8_blockwise)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x_RD, counts_E = torch.randn(11, 128, requires_grad=True), torch.tensor([4, 0, 7])
    assert host_reads(lambda: experts(x_RD, counts_E).sum().backward(), torch.device("cpu")) == {}


@pytest.mark.parametrize("products", [Products.fp8_rowwise, Products.mxfp8])
def test_torchs_kernel_gets_operands_that_give_the_reference(products: Products, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a double, with the checks that torch makes of the operands; groups without rows, and more than a tile of 128 rows."""
    ends_E = torch.tensor([3, 3, 140, 300], dtype=torch.int32)
    rows_RK, weights_ENK = torch.randn(300, 160).bfloat16(), torch.randn(4, 96, 160).bfloat16()
    multiply = rowwise_double if products is Products.fp8_rowwise else mx_double
    monkeypatch.setattr(torch, "_scaled_grouped_mm", checked(multiply))
    with dry_run("cuda"):
        found = product(products, rows_RK, weights_ENK, ends_E)
        back = product(products, found, weights_ENK.transpose(1, 2), ends_E)
    expected = product(products, rows_RK.float(), weights_ENK.float(), ends_E)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-3)
    torch.testing.assert_close(
        back.float(), product(products, found.float(), weights_ENK.float().transpose(1, 2), ends_E), rtol=2**-8, atol=1e-3
    )


def checked(multiply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(rows: Tensor, weights: Tensor, row_scales: Tensor, weight_scales: Tensor, **settings: Any) -> Tensor:
        from torch._meta_registrations import meta_scaled_grouped_mm

        operands = rows, weights, row_scales, weight_scales
        on_meta = {name: each.to("meta") if isinstance(each, Tensor) else each for name, each in settings.items()}
        checked = meta_scaled_grouped_mm(*(each.to("meta") for each in operands), **on_meta)
        product = multiply(*operands, settings["offs"]).to(settings["out_dtype"])
        assert checked.shape == product.shape and checked.dtype == product.dtype
        return product

    return call


def rowwise_double(rows: Tensor, weights: Tensor, row_scales: Tensor, weight_scales: Tensor, ends_E: Tensor) -> Tensor:
    wide = rows.float() * row_scales[:, None], weights.float() * weight_scales[:, None]
    return by_group(*wide, ends_E)


def mx_double(rows: Tensor, weights: Tensor, row_scales: Tensor, weight_scales: Tensor, ends_E: Tensor) -> Tensor:
    """Reads scales from their places: those of the rows of a group begin at a multiple of 128 rows."""
    blocks, padded = rows.shape[1] // 32, -(-rows.shape[1] // 128) * 4
    sizes, begin, wide = torch.diff(ends_E, prepend=torch.zeros(1, dtype=torch.int32)).tolist(), 0, []
    flat = row_scales.float().flatten()
    for end, size in zip(ends_E.tolist(), sizes, strict=True):
        scales = torch.tensor([[flat[begin * padded + place(r, b, padded)] for b in range(blocks)] for r in range(size)])
        wide.append(rows[end - size : end].float() * scales.view(size, blocks).repeat_interleave(32, 1))
        begin += -(-size // 128) * 128
    of_weights = torch.stack(
        [
            torch.tensor([[flat[place(n, b, padded)] for b in range(blocks)] for n in range(weights.shape[2])])
            for flat in weight_scales.float()
        ]
    )
    return by_group(torch.cat(wide), weights.float() * of_weights.repeat_interleave(32, 2).transpose(1, 2), ends_E)


def place(row: int, block: int, blocks: int) -> int:
    """cuBLAS's order of scales: tiles of 128 rows and 4 blocks, in each of which 32 rows, 4 times 32 rows apart, are together."""
    tile = (row // 128) * (blocks // 4) + block // 4
    return 512 * tile + row % 32 * 16 + row % 128 // 32 * 4 + block % 4


def by_group(rows: Tensor, weights: Tensor, ends_E: Tensor) -> Tensor:
    return torch.cat([part @ weight for part, weight in zip(rows.tensor_split(ends_E[:-1].long()), weights, strict=True)])


def test_a_gpu_without_a_kernel_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    config = ModelConfig(products=Products.fp8_blockwise, moe=MoEConfig(products=Products.mxfp8))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    fp8.warn_of_emulated_products(config, torch.device("cpu"))
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        fp8.warn_of_emulated_products(config, torch.device("cuda", 0))
    slower = "on this GPU: the rounded numbers are multiplied in bf16, slower than wide"
    assert caplog.messages == [f"no kernel for model.moe.products=mxfp8 {slower}"]
    monkeypatch.setattr(fp8, "KERNELS_LACK", ["triton"])
    fp8.warn_of_emulated_products(config, torch.device("cuda", 0))
    assert caplog.messages[1:] == [f"no kernel for model.products=fp8_blockwise model.moe.products=mxfp8 {slower}"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounded_tokens_come_out_of_bytes_as_they_were(dtype: torch.dtype) -> None:
    x_RD = (torch.randn(300, 200, dtype=torch.float64) * torch.logspace(-8, 8, 300, dtype=torch.float64)[:, None]).to(dtype)
    x_RD[3] = 0
    tokens_RD = fp8.round_tokens(x_RD)
    packed = pack_tokens(tokens_RD)
    assert packed.dtype == torch.uint8 and packed.shape == (300, 202)
    assert torch.equal(unpack_tokens(packed, 200, dtype), tokens_RD)
    assert_nearest(x_RD, TOKENS)


def test_the_gradient_of_rounded_tokens_passes_as_it_is() -> None:
    x_TD, grad_TD = torch.randn(3, 128, requires_grad=True), torch.randn(3, 128)
    assert torch.equal(torch.autograd.grad(fp8.round_tokens(x_TD), x_TD, grad_TD)[0], grad_TD)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("products", [Products.fp8_blockwise, Products.mxfp8])
def test_a_block_compiles_whole(products: Products) -> None:
    """Up to the code generator; dropped choices leave rows that no expert computes."""
    torch.compiler.reset()
    moe = MoEConfig(experts=4, hidden=128, shared_hidden=128, products=products)
    moe.capacity.factor = 0.7
    model = Transformer(ModelConfig(layers=1, width=128, heads=4, vocabulary=40, moe=moe, products=products))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert model.blocks[0].moe is not None
    model.blocks[0].moe.rounds_tokens = True
    ids_BS, results = torch.randint(40, (2, 16)), []
    for forward in (Block.forward, torch.compile(Block.forward, fullgraph=True, backend="aot_eager")):
        model.blocks[0].forward = lambda *inputs, forward=forward: forward(model.blocks[0], *inputs)
        logits_BSV = model(ids_BS)
        results.append([logits_BSV, *torch.autograd.grad(logits_BSV.square().mean(), list(model.parameters()))])
    for compiled, eager in zip(*reversed(results), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_generated_code_rounds_as_torch_does() -> None:
    """Also blocks at the end that are smaller; and hands the numbers to an operator."""
    from torch._inductor import config as inductor

    torch.compiler.reset()
    x_RK, weights_ENK, ends_E = torch.randn(9, 144), torch.randn(2, 96, 144), torch.tensor([4, 9], dtype=torch.int32)
    with inductor.patch(compile_threads=1):  # starting a pool of compilers takes longer
        found = torch.compile(product, fullgraph=True)(Products.fp8_blockwise, x_RK, weights_ENK, ends_E)
    torch.testing.assert_close(found, product(Products.fp8_blockwise, x_RK, weights_ENK, ends_E), rtol=1e-5, atol=1e-5)


def test_scales_are_fp32_whatever_the_operand() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        values, scales = scaled(torch.randn(256, 384, dtype=dtype), Blocks(128, 128))
        assert values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32 and scales.shape == (2, 3)
