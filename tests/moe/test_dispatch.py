"""Dispatch and combine against a loop over tokens and choices, dropped ones included."""

import pytest
import torch
from tokenyard.moe.device import dry_run
from tokenyard.moe.dispatch import LocalDispatcher, RowPlan, permute, plan_rows, unpermute
from tokenyard.moe.router import Routing
from torch import Tensor

EXPERTS, WIDTH = 5, 3
CASES = {
    "some dropped": (11, 2, 0.3),
    "dropless": (11, 3, None),
    "top-1": (7, 1, 0.2),
    "all dropped": (4, 2, 1.0),
    "no tokens": (0, 2, None),
    "no tokens, dropping": (0, 2, 0.5),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_a_loop(case: tuple[int, int, float | None]) -> None:
    routing, x_TD = random_routing(*case), torch.randn(case[0], WIDTH, dtype=torch.float64, requires_grad=True)
    dispatcher = LocalDispatcher(EXPERTS)
    dispatched = dispatcher.dispatch(x_TD, routing)
    scale_R = expert_of_rows(dispatched.metadata[0])[:, None] + 1.0
    y_TD = dispatcher.combine(dispatched.tokens_RD.sin() * scale_R, dispatched)
    expected_TD = by_loop(x_TD, routing)
    assert y_TD.shape == x_TD.shape and y_TD.dtype == x_TD.dtype
    torch.testing.assert_close(y_TD, expected_TD, rtol=0, atol=1e-14)
    weight_TD, inputs = torch.randn(x_TD.shape, dtype=torch.float64), (x_TD, routing.weights_TK)
    gradients = torch.autograd.grad(y_TD, inputs, weight_TD)
    for gradient, expected in zip(gradients, torch.autograd.grad(expected_TD, inputs, weight_TD), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_are_the_kept_choices_in_the_order_of_expert_and_token(case: tuple[int, int, float | None]) -> None:
    routing = random_routing(*case)
    plan = plan_rows(routing, EXPERTS)
    choices = [
        (int(routing.experts_TK[t, k]), t, k)
        for t in range(case[0])
        for k in range(case[1])
        if routing.kept_TK is None or routing.kept_TK[t, k]
    ]
    assert plan.counts_E.tolist() == [sum(e == expert for e, _, _ in choices) for expert in range(EXPERTS)]
    assert plan.token_R.tolist() == [t for _, t, _ in sorted(choices)]
    slots = {(t, k): row for row, (_, t, k) in enumerate(sorted(choices))}
    assert plan.slot_TK.tolist() == [[slots.get((t, k), -1) for k in range(case[1])] for t in range(case[0])]


def test_all_tokens_to_one_expert() -> None:
    x_TD = torch.randn(6, WIDTH)
    routing = Routing(torch.full((6, 1), 3), torch.ones(6, 1), None, stats=None)  # pyright: ignore[reportArgumentType]
    dispatched = LocalDispatcher(EXPERTS).dispatch(x_TD, routing)
    assert dispatched.counts_E.tolist() == [0, 0, 0, 6, 0]
    assert torch.equal(dispatched.tokens_RD, x_TD)
    assert torch.equal(LocalDispatcher(EXPERTS).combine(dispatched.tokens_RD, dispatched), x_TD)


def test_derivatives_of_copy_and_sum() -> None:
    routing = random_routing(5, 2, 0.4)
    plan = plan_rows(routing, EXPERTS)
    assert 0 < len(plan.token_R) < 10, "some are dropped, some are not"
    x_TD = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    y_RD = torch.randn(len(plan.token_R), WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, plan), (x_TD,))
    assert torch.autograd.gradcheck(lambda y, w: unpermute(y, w, plan), (y_RD, routing.weights_TK))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("dropped", [None, 0.3])
def test_bf16_rows_are_summed_in_fp32(kind: str, dropped: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and both gradients are within one rounding of the exact values; on CUDA a few tokens are summed at a time.

    Without kernels, as Triton's interpreter does not round bf16 to nearest.
    """
    monkeypatch.setattr("tokenyard.moe.device.KERNELS", False)
    monkeypatch.setattr("tokenyard.moe.dispatch.MAX_ELEMENTS", 2 * 8 * 64)
    torch.manual_seed(0)
    kept_TK = None if dropped is None else torch.rand(9, 8) >= dropped
    routing = Routing(torch.rand(9, 32).argsort(1)[:, :8], torch.rand(9, 8), kept_TK, stats=None)  # pyright: ignore[reportArgumentType]
    plan, weights_TK = plan_rows(routing, 32), routing.weights_TK.requires_grad_()
    x_TD, y_RD = torch.randn(9, 64).bfloat16().requires_grad_(), torch.randn(len(plan.token_R), 64).bfloat16().requires_grad_()
    grad_TD, grad_RD = torch.randn(9, 64).bfloat16(), torch.randn(y_RD.shape).bfloat16()
    with dry_run(kind):
        output = unpermute(y_RD, weights_TK, plan)
        narrow = [output, *torch.autograd.grad(output, (y_RD, weights_TK), grad_TD)]
        narrow += torch.autograd.grad(permute(x_TD, plan), x_TD, grad_RD)
    wide = [x.detach().double().requires_grad_() for x in (x_TD, y_RD, weights_TK)]
    exact = [expected(wide[1], wide[2], plan)]
    exact += torch.autograd.grad(exact[0], wide[1:], grad_TD.double())
    exact += torch.autograd.grad(wide[0][plan.token_R], wide[0], grad_RD.double())
    for value, reference in zip(narrow, exact, strict=True):
        half_unit = 2.0**-8 if value.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(value.double(), reference, rtol=half_unit, atol=1e-5)


def expected(y_RD: Tensor, weights_TK: Tensor, plan: RowPlan) -> Tensor:
    """Each token's weighted sum, by torch's own gradient."""
    y_TKD = torch.cat([y_RD, y_RD.new_zeros(1, y_RD.shape[1])])[plan.slot_TK]  # dropped choices (-1) take the last row
    return (y_TKD * weights_TK.unsqueeze(-1)).sum(1)


def random_routing(tokens: int, top_k: int, dropped: float | None) -> Routing:
    torch.manual_seed(0)
    experts_TK = torch.rand(tokens, EXPERTS).argsort(1)[:, :top_k]
    weights_TK = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    kept_TK = None if dropped is None else torch.rand(tokens, top_k) >= dropped
    return Routing(experts_TK, weights_TK, kept_TK, stats=None)  # pyright: ignore[reportArgumentType]


def expert_of_rows(plan: RowPlan) -> Tensor:
    return torch.repeat_interleave(torch.arange(EXPERTS), plan.counts_E)


def by_loop(x_TD: Tensor, routing: Routing) -> Tensor:
    """Expert e multiplies the sine of its row by e + 1."""
    totals = [torch.zeros(WIDTH, dtype=torch.float64) + 0 * x.sum() for x in x_TD]
    for t, (experts, weights) in enumerate(zip(routing.experts_TK.tolist(), routing.weights_TK, strict=True)):
        for k, expert in enumerate(experts):
            if routing.kept_TK is None or routing.kept_TK[t, k]:
                totals[t] = totals[t] + weights[k] * x_TD[t].sin() * (expert + 1)
    return torch.stack(totals) + 0 * routing.weights_TK.sum() if totals else x_TD * 1 + routing.weights_TK.sum()
