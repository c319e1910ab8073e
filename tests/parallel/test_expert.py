"""Expert parallelism on real ranks equals one device that has all experts; the plan of the exchange equals a loop."""

from typing import Any

import pytest
import torch
from tokenyard.moe.dispatch import Arrived, Dispatcher, LocalDispatcher
from tokenyard.moe.experts import Experts
from tokenyard.moe.router import Routing
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.expert import ExchangeDispatcher, plan_exchange, reorder
from tokenyard.parallel.mesh import build_mesh
from torch import Tensor

EXPERTS, WIDTH, HIDDEN, TOP_K = 8, 4, 6, 2
TOKENS = {"even": [5, 5, 5, 5], "uneven": [7, 1, 4, 2], "one rank without tokens": [3, 0, 6, 2], "nobody has tokens": [0, 0, 0, 0]}


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (2, 4), (4, 2), (3, 5)])
@pytest.mark.parametrize("most", [0, 1, 4])
def test_plan_equals_a_loop(shape: tuple[int, int], most: int) -> None:
    torch.manual_seed(most)
    sent_NL, came_NL = torch.randint(most + 1, shape), torch.randint(most + 1, shape)
    plan = plan_exchange(sent_NL, came_NL)
    assert plan.sent_N == [sum(row) for row in sent_NL.tolist()] and plan.came_N == [sum(row) for row in came_NL.tolist()]
    ranks, experts = shape
    rows = [(rank, expert, i) for rank in range(ranks) for expert in range(experts) for i in range(int(came_NL[rank, expert]))]
    arrived = [rows[place] for place in plan.order_A.tolist()]
    assert arrived == sorted(rows, key=lambda row: (row[1], row[0], row[2]))
    assert [arrived[place] for place in plan.back_A.tolist()] == rows


def test_reorder_and_its_gradient() -> None:
    torch.manual_seed(0)
    order = torch.randperm(6)
    rows = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(reorder(rows, order, order.argsort()), rows[order])
    assert torch.autograd.gradcheck(lambda x: reorder(x, order, order.argsort()), (rows,))


@pytest.mark.parametrize("dropped", [None, 0.4])
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_device(ranks: Any, world: int, tokens: list[int], dropped: float | None) -> None:
    """Outputs and gradients of tokens and weights rank by rank; gradients of experts are sums over the ranks' tokens."""
    torch.manual_seed(0)
    assert_ranks_equal_one_device(ranks, [random_tokens(count, dropped) for count in tokens[:world]])


def test_all_tokens_to_one_expert(ranks: Any) -> None:
    """Three of four ranks receive nothing."""
    torch.manual_seed(0)
    parts = [random_tokens(5, None) for _ in range(4)]
    for part in parts:
        part["experts_TK"][:] = torch.tensor([3, 3])
    assert_ranks_equal_one_device(ranks, parts)


def assert_ranks_equal_one_device(ranks: Any, parts: list[dict[str, Any]]) -> None:
    found = ranks(len(parts), spread, parts)
    expected = [moe(LocalDispatcher(EXPERTS), all_experts(), part) for part in parts]
    for of_rank, reference in zip(found, expected, strict=True):
        for name in ("y_TD", "x_TD", "weights_TK"):
            torch.testing.assert_close(of_rank[name], reference[name], rtol=1e-12, atol=1e-13)
    for name in ("gate_up", "down"):
        summed = torch.stack([reference[name] for reference in expected]).sum(0)
        torch.testing.assert_close(torch.cat([of_rank[name] for of_rank in found]), summed, rtol=1e-12, atol=1e-13)


def spread(parts: list[dict[str, Any]]) -> dict[str, Tensor]:
    axis = build_mesh(ParallelConfig(expert=len(parts))).axis("expert")
    experts = all_experts()
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, torch.nn.Parameter(parameter.detach().chunk(axis.size)[axis.rank].clone()))
    return moe(ExchangeDispatcher(EXPERTS, axis), experts, parts[axis.rank])


def moe(dispatcher: Dispatcher, experts: Experts, part: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs, and gradients of the sum of their squares."""
    x_TD, weights_TK = part["x_TD"].clone().requires_grad_(), part["weights_TK"].clone().requires_grad_()
    routing = Routing(part["experts_TK"], weights_TK, part["kept_TK"], stats=None)  # pyright: ignore[reportArgumentType]
    arrived: Arrived = dispatcher.dispatch(x_TD, routing)
    y_TD = dispatcher.combine(experts(arrived.tokens_RD, arrived.counts_E), arrived)
    y_TD.square().sum().backward()
    leaves = {"x_TD": x_TD, "weights_TK": weights_TK, **dict(experts.named_parameters())}
    return {"y_TD": y_TD.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def random_tokens(tokens: int, dropped: float | None) -> dict[str, Any]:
    return {
        "x_TD": torch.randn(tokens, WIDTH, dtype=torch.float64),
        "experts_TK": torch.rand(tokens, EXPERTS).argsort(1)[:, :TOP_K],
        "weights_TK": torch.rand(tokens, TOP_K, dtype=torch.float64),
        "kept_TK": None if dropped is None else torch.rand(tokens, TOP_K) >= dropped,
    }


def all_experts() -> Experts:
    generator = torch.Generator().manual_seed(1)
    experts = Experts(EXPERTS, WIDTH, HIDDEN, torch.float64)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return experts
