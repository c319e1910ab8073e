"""The experts' function of tokens, with its own backward pass, equals dispatch, a loop over experts, and combine by autograd."""

import pytest
import torch
from tokenyard.bench.host_reads import host_reads
from tokenyard.moe import device, linear
from tokenyard.moe import experts as experts_module
from tokenyard.moe.config import Activation
from tokenyard.moe.device import dry_run
from tokenyard.moe.dispatch import Choices, FusedDispatcher, LocalDispatcher, RowPlan, pad_to_multiple, plan_rows, row_alignment
from tokenyard.moe.dropout import Dropout
from tokenyard.moe.experts import Experts, experts_by_loop
from tokenyard.moe.feedforward import activate, activate_with_backward
from tokenyard.moe.router import Routing
from tokenyard.moe.token_info import Purpose
from torch import Tensor

EXPERTS, WIDTH, HIDDEN = 5, 16, 24
CASES = {
    "dropless": (11, 2, None, None),
    "some dropped": (11, 3, 0.3, None),
    "padded": (11, 2, 0.3, 9),
    "all dropped": (4, 2, 1.0, None),
    "no tokens": (0, 2, None, None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_dispatch_experts_combine(
    case: tuple[int, int, float | None, int | None], activation: Activation, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = random_experts(torch.float64, activation, bias)
    routing, x_TD = random_routing(*case), torch.randn(case[0], WIDTH, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(experts_module, "BLOCK", 3 * HIDDEN)  # more than one block
    fused = FusedDispatcher(EXPERTS).run(x_TD, routing, experts, lambda: lambda: None)
    plain = LocalDispatcher(EXPERTS).run(
        x_TD, routing, lambda x_RD, counts_E: experts_by_loop(experts, x_RD, counts_E), lambda: lambda: None
    )
    assert fused.rows == plain.rows
    torch.testing.assert_close(fused.y_TD, plain.y_TD, rtol=0, atol=1e-14)
    inputs, weight_TD = (x_TD, routing.weights_TK, *experts.parameters()), torch.randn_like(x_TD)
    gradients = torch.autograd.grad(fused.y_TD, inputs, weight_TD)
    for gradient, expected in zip(gradients, torch.autograd.grad(plain.y_TD, inputs, weight_TD), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("activation", Activation)
def test_the_derivatives_are_those_of_autograd(activation: Activation) -> None:
    x = (4 * torch.randn(50, 6 * activation.projections, dtype=torch.float64)).requires_grad_()
    grad = torch.randn(50, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(activate(activation, x), x, grad)
    result = torch.empty_like(x)
    active, pull = activate_with_backward(activation, x.detach())
    pull(grad, result)
    torch.testing.assert_close(active, activate(activation, x.detach()), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_the_weights_gradient_is_not_rounded_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bf16 products and without kernels: the gradient of a row's weight sums exact products of activation and gradient."""
    monkeypatch.setattr(device, "KERNELS", False)
    torch.manual_seed(0)
    inner_RN, grad_RF = torch.randn(5, 2 * 256).bfloat16(), torch.randn(5, 256).bfloat16()
    active_RF, exact = activate(Activation.swiglu, inner_RN), grad_RF.double()
    with dry_run("cuda"):
        *_, found_R = experts_module._activation_backward(Activation.swiglu, inner_RN, grad_RF, torch.ones(5, 1))
    torch.testing.assert_close(found_R.double(), (active_RF.double() * exact).sum(-1), rtol=1e-5, atol=1e-5)


def test_experts_with_biases_do_not_make_the_host_wait() -> None:
    experts, routing = random_experts(torch.float32, bias=True), random_routing(11, 2, None, None)
    x_TD, plan = torch.randn(11, WIDTH, requires_grad=True), plan_rows(routing, EXPERTS)
    choices = Choices(plan, routing.weights_TK.float())
    assert host_reads(lambda: experts(x_TD, plan.counts_E, choices).sum().backward(), torch.device("cpu")) == {}


def test_rounding_up_changes_no_number() -> None:
    """Padding rows are zeros that are ignored: outputs and gradients do not change, and the numbers of rows are multiples."""
    experts, routing = random_experts(torch.float64), random_routing(11, 2, 0.3, None)
    x_TD = torch.randn(11, WIDTH, dtype=torch.float64)
    plan = plan_rows(routing, EXPERTS)
    experts_TK = routing.experts_TK.masked_fill(~routing.kept_TK, EXPERTS)  # pyright: ignore[reportOptionalOperand]
    filled = pad_to_multiple(plan, experts_TK, 4)
    assert filled.filled_R is not None and filled.counts_E.tolist() == [-(-n // 4) * 4 for n in plan.counts_E.tolist()]
    assert int(filled.filled_R.sum()) == len(plan.token_R) and len(filled.token_R) == int(filled.counts_E.sum())
    outcomes = [run(experts, x_TD, routing.weights_TK, each) for each in (plan, filled)]
    for plain, padded in zip(*outcomes, strict=True):
        torch.testing.assert_close(plain, padded, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("multiplies", [False, True])
def test_bf16_on_a_cpu_is_close(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are padded to a multiple if the CPU has bf16 products, and not otherwise."""
    monkeypatch.setattr(linear, "MULTIPLIES_BF16", multiplies)
    experts, narrow = random_experts(torch.float64, bias=True), random_experts(torch.bfloat16, bias=True)
    narrow.load_state_dict(experts.state_dict())
    routing, x_TD = random_routing(40, 2, None, None), torch.randn(40, WIDTH, dtype=torch.float64, requires_grad=True)
    assert row_alignment(x_TD.bfloat16()) == (32 if multiplies else 1)
    y_TD = FusedDispatcher(EXPERTS).run(x_TD, routing, experts, lambda: lambda: None).y_TD
    result = FusedDispatcher(EXPERTS).run(x_TD.bfloat16(), routing, narrow, lambda: lambda: None)
    assert result.y_TD.dtype == torch.bfloat16 and result.rows == 80
    weight_TD = torch.randn_like(y_TD)
    expected = torch.autograd.grad(y_TD, (x_TD, routing.weights_TK, *experts.parameters()), weight_TD)
    gradients = torch.autograd.grad(result.y_TD, (x_TD, routing.weights_TK, *narrow.parameters()), weight_TD.bfloat16())
    for value, reference in zip((result.y_TD, *gradients), (y_TD, *expected), strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=0, atol=0.05 * float(reference.detach().abs().max()))


def test_what_is_kept_for_the_backward_pass() -> None:
    """Only the tokens and the first product are saved: no copies of rows, no activations, no outputs."""
    experts, routing = random_experts(torch.float32), random_routing(64, 2, None, None)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}
    x_TD = torch.randn(64, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        FusedDispatcher(EXPERTS).run(x_TD, routing, experts, lambda: lambda: None)
    activations = sum(size for pointer, size in kept.items() if pointer not in weights)
    indices = 8 * (2 * 64 + 2 * 64 + 2 * EXPERTS) + 8 * 2 * 64
    assert activations <= 4 * (64 * WIDTH + 2 * 64 * 2 * HIDDEN) + indices


def run(experts: Experts, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan) -> list[Tensor]:
    x_TD = x_TD.clone().requires_grad_()
    y_TD = experts(x_TD, plan.counts_E, Choices(plan, weights_TK))
    return [y_TD, *torch.autograd.grad(y_TD.square().sum(), (x_TD, weights_TK, *experts.parameters()))]


def random_experts(dtype: torch.dtype, activation: Activation = Activation.swiglu, bias: bool = False) -> Experts:
    experts = Experts(EXPERTS, WIDTH, HIDDEN, dtype, activation, bias)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def random_routing(tokens: int, top_k: int, dropped: float | None, padded_rows: int | None) -> Routing:
    """Random routing with distinct experts for each token."""
    experts_TK = torch.rand(tokens, EXPERTS).argsort(dim=1)[:, :top_k]
    weights_TK = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    kept_TK = None if dropped is None else torch.rand(tokens, top_k) >= dropped
    return Routing(experts_TK, weights_TK, kept_TK, stats=None, padded_rows=padded_rows)  # pyright: ignore[reportArgumentType]


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, which triton's interpreter uses
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_rows_behind_those_of_all_experts_change_nothing(kind: str, dtype: torch.dtype) -> None:
    """NaN behind the counts, in the rows and in their gradient, as in memory that nobody has written; with biases and dropout."""
    experts = random_experts(dtype, Activation.swiglu, bias=True)
    experts.dropout = Dropout(0.5, Purpose.hidden_dropout)
    counts_E, keys_R = torch.tensor([3, 0, 4, 1, 2]), torch.arange(16)
    rows_RD, gradient_RD = torch.randn(16, WIDTH, dtype=dtype), torch.randn(16, WIDTH, dtype=dtype)
    rows_RD[10:], gradient_RD[10:] = torch.nan, torch.nan

    def outputs_and_gradients(rows: int) -> list[Tensor]:
        x_RD = rows_RD[:rows].clone().requires_grad_()
        y_RD = experts(x_RD, counts_E, keys_R=keys_R[:rows])
        gradients = torch.autograd.grad(y_RD, (x_RD, *experts.parameters()), gradient_RD[:rows])
        return [y_RD.detach()[:10], gradients[0][:10], *gradients[1:]]

    with dry_run(kind):
        for found, expected in zip(outputs_and_gradients(16), outputs_and_gradients(10), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)
