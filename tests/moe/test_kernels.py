"""The Triton kernels equal the code that they replace. They run in Triton's interpreter, on the CPU, in fp32 and fp16."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import kernel_bounds
import pytest
import torch
from tokenyard.data.batches import IGNORE
from tokenyard.moe import device, dispatch, feedforward, linear
from tokenyard.moe.config import Activation
from tokenyard.moe.device import dry_run
from tokenyard.moe.dispatch import RowPlan, count_rows, plan_choices, weights_per_row
from tokenyard.moe.kernels import activation as activation_kernels
from tokenyard.moe.kernels import casts, rotation
from tokenyard.moe.kernels import rows as row_kernels
from tokenyard.moe.model import Transformer
from tokenyard.moe.rotary import RotaryTables, rotate
from tokenyard.parallel import vocabulary
from tokenyard.parallel.mesh import Axis
from tokenyard.parallel.vocabulary import cross_entropy
from tokenyard.train.config.compose import compose
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("bounded_kernels"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # numpy's, which the interpreter uses
]

SHAPES = {  # tokens, experts, choices of each, width
    "one token": (1, 1, 1, 8),
    "no tile divides the width": (13, 5, 3, 37),
    "more than one tile": (3, 4, 2, 1100),
    "top-8 of 512": (5, 512, 8, 16),
    "top-1": (7, 3, 1, 64),
}
ALONE = Axis(1, 0, None)
KEEP = {"dropless": None, "half dropped": 0.5, "all dropped": 0.0}
DTYPES = {torch.float32: 1e-5, torch.float16: 4e-3}
"""Tolerances: absolute, and relative to the largest number."""


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("keep", KEEP.values(), ids=KEEP)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_copies_of_tokens(shape: tuple[int, int, int, int], keep: float | None, padded: bool) -> None:
    plan = random_rows(*shape, keep, torch.float32, padded)[0]
    x_TD = torch.randn(shape[0], shape[3])
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        found = row_kernels.copy_rows(x_TD, plan.slot_TK, plan.filled_R, len(plan.token_R))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found, dispatch.gather_rows(x_TD, plan))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("width", [1, 37, 1100])
def test_rows_are_put_into_memory_of_others(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, index_R, rank_R = torch.randint(99, (5, width)).to(dtype), torch.randint(5, (9,)), torch.randint(-1, 3, (9,))
    row_R, memory_NR = torch.randperm(16)[:9], torch.zeros(3, 16, width, dtype=dtype)
    monkeypatch.setattr(kernel_bounds, "REACHED", [memory_NR])
    for index in (index_R, None):
        ranks, rows = (rank_R, row_R) if index is not None else (rank_R[:5], row_R[:5])
        expected = memory_NR.clone()
        for i, (rank, row) in enumerate(zip(ranks.tolist(), rows.tolist(), strict=True)):
            if rank >= 0:
                expected[rank, row] = x[i if index is None else index[i]]
        row_kernels.put_rows(x, index, ranks, rows, torch.tensor([memory.data_ptr() for memory in memory_NR]))
        assert torch.equal(memory_NR, expected) and expected.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", KEEP.values(), ids=KEEP)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sum_of_rows(shape: tuple[int, int, int, int], keep: float | None, dtype: torch.dtype) -> None:
    plan, weights_TK, y_RD = random_rows(*shape, keep, dtype)
    for weights in (weights_TK, None):
        expected = dispatch.sum_rows(y_RD.double(), plan, None if weights is None else weights.double())
        close(row_kernels.sum_rows(y_RD, plan.slot_TK, weights), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_backward_pass_of_the_sum(shape: tuple[int, int, int, int], padded: bool, dtype: torch.dtype) -> None:
    plan, weights_TK, y_RD = random_rows(*shape, 0.5, dtype, padded)
    grad_TD = torch.randn(shape[0], shape[3]).to(dtype)
    weights, rows = weights_TK.double().requires_grad_(), y_RD.double().requires_grad_()
    dispatch.unpermute(rows, weights, plan).backward(grad_TD.double())
    found, dots_R = row_kernels.unpermute_backward(grad_TD, y_RD, plan.token_R, plan.filled_R, weights_per_row(weights_TK, plan))
    assert rows.grad is not None and weights.grad is not None
    close(found, rows.grad, dtype)
    close(dispatch.values_per_choice(dots_R, plan), weights.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 24, 1100])
@pytest.mark.parametrize("activation", Activation)
def test_activations_and_their_backward_passes(activation: Activation, hidden: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, kind = 5, activation.value
    x_RN = (4 * torch.randn(rows, activation.projections * hidden)).to(dtype)
    grad_RF, weights_R = torch.randn(rows, hidden).to(dtype), torch.rand(rows)
    wide, weights = x_RN.double().requires_grad_(), weights_R.double().requires_grad_()
    active_RF = feedforward.activate(activation, wide)
    (active_RF * weights[:, None]).backward(grad_RF.double())
    assert wide.grad is not None and weights.grad is not None
    close(activation_kernels.activate(x_RN, kind), active_RF, dtype)
    kept_RF = grad_RF.clone()
    grad_x_RN, dots_R = activation_kernels.activate_backward(x_RN, kept_RF, weights_R, kind, keeps=True)
    close(grad_x_RN, wide.grad, dtype)
    close(dots_R, weights.grad, dtype)
    close(kept_RF, active_RF * weights[:, None], dtype)
    kept_RF = grad_RF.clone()
    grad_x_RN, dots_R = activation_kernels.activate_backward(x_RN, kept_RF, None, kind, keeps=False)
    (expected,) = torch.autograd.grad(feedforward.activate(activation, wide), wide, grad_RF.double())
    close(grad_x_RN, expected, dtype)
    assert torch.equal(kept_RF, grad_RF) and not len(dots_R)


@pytest.mark.parametrize("activation", Activation)
def test_activations_pass_on_what_is_not_finite(activation: Activation) -> None:
    x_RN = torch.tensor([torch.nan, 9.0, -9.0, 30.0, -30.0]).repeat(activation.projections)[None]
    found = activation_kernels.activate(x_RN, activation.value)
    torch.testing.assert_close(found, feedforward.activate(activation, x_RN), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("documents", [False, True], ids=["positions", "documents"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize(("heads", "width", "rotated"), [(1, 8, 8), (3, 12, 12), (5, 24, 8), (20, 128, 128)])
def test_rotation_and_its_backward_pass(
    heads: int, width: int, rotated: int, interleaved: bool, documents: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    batch, tokens = 2, 3
    angles = torch.randn(*((batch, 1) if documents else ()), tokens, rotated // 2)
    tables = RotaryTables(1.5 * angles.cos(), 1.5 * angles.sin(), None, {})
    x_BHSh = torch.randn(batch, tokens, heads, width).to(dtype).transpose(1, 2)  # as projections leave it
    grad_BHSh = torch.randn(batch, heads, tokens, width).to(dtype)
    wide = x_BHSh.double().requires_grad_()
    expected = rotate(wide, tables._replace(cos=tables.cos.double(), sin=tables.sin.double()), interleaved)
    expected.backward(grad_BHSh.double())
    assert wide.grad is not None
    found = rotation.rotate(x_BHSh, tables.cos, tables.sin, interleaved, False)
    close(found, expected, dtype)
    assert found.stride() == x_BHSh.stride()
    close(rotation.rotate(grad_BHSh, tables.cos, tables.sin, interleaved, True), wide.grad, dtype)


@pytest.mark.parametrize("counts", [[0, 3, 0, 2], [5], [0], [0, 0, 4]])
def test_zeros_for_groups_without_rows(counts: list[int]) -> None:
    product_ENK = torch.randn(len(counts), 37, 70)
    expected = product_ENK * (torch.tensor(counts) > 0)[:, None, None]
    ends_E = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    assert torch.equal(row_kernels.zero_empty_groups(product_ENK, ends_E), expected)


def test_the_three_bf16_parts_of_a_number_are_the_number() -> None:
    torch.manual_seed(0)
    x_RC = torch.randn(5, 37) * 10.0 ** torch.randint(-9, 9, (5, 37))
    side_by_side = casts.bf16_parts(x_RC, [2, 0, 1, 0], 1).unflatten(1, (4, 37))
    assert torch.equal(side_by_side[:, :3].double().sum(1), x_RC.double())
    assert torch.equal(side_by_side[:, 1], side_by_side[:, 3])
    assert (side_by_side[:, 1] - x_RC).abs().le(x_RC.abs() / 2**7).all()
    above = casts.bf16_parts(x_RC, [2, 0, 1, 0], 0).unflatten(0, (4, 5))
    assert torch.equal(above.transpose(0, 1), side_by_side)


def test_a_wide_product_of_bf16_numbers_from_parts() -> None:
    torch.manual_seed(0)
    x, weight_ED, grad = torch.randn(2, 40, 24).bfloat16(), torch.randn(12, 24), torch.randn(2, 40, 12)

    def product_and_gradients(x: Tensor, weight_ED: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight_ED = x.clone().requires_grad_(), weight_ED.clone().requires_grad_()
        y = linear.wide_linear(x, weight_ED, grad.dtype)
        y.backward(grad)
        assert x.grad is not None and weight_ED.grad is not None
        return y.detach(), weight_ED.grad, x.grad

    expected = product_and_gradients(x.double(), weight_ED.double(), grad.double())
    with dry_run("cuda"), patch.object(linear, "_product", lambda *_: pytest.fail("not from parts")):
        found = product_and_gradients(x, weight_ED, grad)
    assert [one.dtype for one in found] == [torch.float32, torch.float32, torch.bfloat16]
    for value, exact, tolerance in zip(found, expected, (1e-6, 1e-6, 2**-7), strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "columns"), [(0, 8), (1, 1), (7, 37), (5, 5000)])
def test_cross_entropy(tokens: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits_TV, targets_T = (8 * torch.randn(tokens, columns)).to(dtype), torch.randint(columns, (tokens,))
    targets_T[::3] = IGNORE
    loss, gradient_TV = cross_entropy(logits_TV.double(), targets_T, IGNORE, ALONE)
    with dry_run("cuda"):
        found = cross_entropy(logits_TV, targets_T, IGNORE, ALONE)
    assert found[1] is logits_TV
    close(found[0], loss, torch.float32)
    close(found[1], gradient_TV, dtype)


def test_cross_entropy_over_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank runs three times, until it has been told the maxima and then the sums of both."""
    torch.manual_seed(0)
    logits_TV, targets_T = 8 * torch.randn(6, 2 * 37), torch.randint(2 * 37, (6,))
    targets_T[0] = IGNORE
    loss, gradient_TV = cross_entropy(logits_TV.double(), targets_T, IGNORE, ALONE)
    own: dict[str, list[Tensor]] = {}
    for _ in range(3):
        told, own = own, {"max": [], "sum": []}
        monkeypatch.setattr(
            vocabulary, "max_over", lambda x, _, own=own, told=told: _told(x, own["max"], told.get("max"), torch.amax)
        )
        monkeypatch.setattr(
            vocabulary, "sum_over", lambda x, _, own=own, told=told: _told(x, own["sum"], told.get("sum"), torch.sum)
        )
        with dry_run("cuda"):
            found = [
                cross_entropy(part.clone(), targets_T, IGNORE, Axis(2, rank, None))
                for rank, part in enumerate(logits_TV.chunk(2, 1))
            ]
    for rank_loss, _ in found:
        close(rank_loss, loss, torch.float32)
    close(torch.cat([part for _, part in found], 1), gradient_TV, torch.float32)


def _told(x: Tensor, own: list[Tensor], told: list[Tensor] | None, reduce: Any) -> Tensor:
    """Reduces in place, as the collectives do."""
    own.append(x.clone())
    return x if told is None else x.copy_(reduce(torch.stack(told), 0))


def test_cross_entropy_passes_on_what_is_not_finite() -> None:
    logits_TV = torch.tensor([[0.0, torch.nan], [0.0, torch.inf], [1.0, 2.0]])
    with dry_run("cuda"):
        loss, gradient_TV = cross_entropy(logits_TV, torch.tensor([0, 1, 1]), IGNORE, ALONE)
    assert loss.isnan()
    assert gradient_TV.isnan().any(1).tolist() == [True, True, False]


def test_without_what_they_need_the_code_that_they_replace_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tensors of a dry run only stand for those of a GPU: they need nothing."""
    on_gpu: Any = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda"))
    monkeypatch.setattr(device, "kind_of", lambda _: "cuda")
    monkeypatch.setattr(device, "KERNELS_LACK", ["a C compiler, which triton calls"])
    assert not device.uses_kernels(on_gpu) and device.uses_kernels(torch.empty(0))
    device.warn_of_missing_kernels(torch.device("cpu"))
    assert caplog.text == ""
    device.warn_of_missing_kernels(torch.device("cuda"))
    assert "no Triton kernels without a C compiler, which triton calls: a layer" in caplog.text
    monkeypatch.setattr(device, "KERNELS_LACK", [])
    caplog.clear()
    assert device.uses_kernels(on_gpu)
    device.warn_of_missing_kernels(torch.device("cuda"))
    assert caplog.text == ""


def random_rows(
    tokens: int, experts: int, top_k: int, width: int, keep: float | None, dtype: torch.dtype, padded: bool = False
) -> tuple[RowPlan, Tensor, Tensor]:
    """A plan of random choices, their weights, and rows."""
    torch.manual_seed(0)
    experts_TK = torch.rand(tokens, experts).topk(top_k).indices
    if keep is not None:
        experts_TK = experts_TK.masked_fill(torch.rand(tokens, top_k) >= keep, experts)
    padded_rows = int(count_rows(experts_TK, experts).counts_E.max()) + 1 if padded else None
    plan = plan_choices(experts_TK, experts, padded_rows, dropping=keep is not None)
    return plan, torch.rand(tokens, top_k), torch.randn(len(plan.token_R), width).to(dtype)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = DTYPES[dtype]
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.detach(), rtol=0, atol=tolerance * max(1.0, largest))


@pytest.mark.parametrize("name", ["tiny_qwen3_moe", "tiny_deepseek_v3", "tiny_gpt_oss", "tiny_switch"])
def test_a_model_has_the_outputs_and_gradients_of_one_without_kernels(name: str) -> None:
    torch.manual_seed(0)
    model = Transformer(compose([f"model={name}"]).model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    ids_BS, gradient = torch.randint(model.config.vocabulary, (2, 9)), torch.randn(2, 9, model.config.vocabulary)

    def outputs_and_gradients() -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(ids_BS)
        logits.backward(gradient)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return {"logits": logits.detach(), **gradients}

    expected = outputs_and_gradients()
    with dry_run("cuda"), patch.object(model, "block_masks", lambda *_: {}):  # FlexAttention needs a GPU
        found = outputs_and_gradients()
    assert found.keys() == expected.keys()
    for key, value in found.items():
        error, size = (value - expected[key]).norm(), expected[key].norm()
        assert error <= 1e-5 * size + 1e-7, key
