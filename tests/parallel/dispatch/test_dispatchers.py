"""Every exchange on real ranks equals one device that has all experts, rank by rank, in fp64."""

from collections import Counter
from typing import Any

import pytest
import torch
from tokenyard.bench.host_reads import host_reads
from tokenyard.moe.device import dry_run
from tokenyard.moe.dispatch import Dispatcher, LocalDispatcher
from tokenyard.moe.experts import Experts
from tokenyard.moe.router import Routing
from tokenyard.parallel.apply import build_dispatcher
from tokenyard.parallel.config import Exchange, ParallelConfig
from tokenyard.parallel.dispatch.all_gather import AllGatherDispatcher
from tokenyard.parallel.dispatch.all_to_all import AllToAllDispatcher, plan_expert_order, read_splits, reorder
from tokenyard.parallel.dispatch.deduplicated import DeduplicatedDispatcher
from tokenyard.parallel.mesh import Axis, build_mesh
from torch import Tensor
from torch._C._distributed_c10d import FakeProcessGroup, ProcessGroup
from torch._subclasses.fake_tensor import FakeTensorMode

EXPERTS, WIDTH, HIDDEN, TOP_K = 8, 4, 6, 3
TOKENS = {"even": [5, 5, 5, 5], "uneven": [7, 1, 4, 2], "one rank without tokens": [3, 0, 6, 2], "nobody has tokens": [0, 0, 0, 0]}
EXCHANGES = {
    "plain": ParallelConfig(exchange=Exchange.plain),
    "plain, 3 chunks": ParallelConfig(exchange=Exchange.plain, overlap_chunks=3),
    "deduplicated": ParallelConfig(exchange=Exchange.deduplicated),
    "deduplicated, 2 chunks": ParallelConfig(exchange=Exchange.deduplicated, overlap_chunks=2),
    "hierarchical": ParallelConfig(exchange=Exchange.hierarchical, node_ranks=2),
    "hierarchical, 2 chunks": ParallelConfig(exchange=Exchange.hierarchical, node_ranks=2, overlap_chunks=2),
    "gather": ParallelConfig(exchange=Exchange.gather),
    "gather, 2 chunks": ParallelConfig(exchange=Exchange.gather, overlap_chunks=2),
}
ALL = pytest.mark.parametrize("config", EXCHANGES.values(), ids=EXCHANGES)


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (2, 4), (4, 2), (3, 5)])
@pytest.mark.parametrize("most", [0, 1, 4])
def test_plan_equals_a_loop(shape: tuple[int, int], most: int) -> None:
    torch.manual_seed(most)
    sent_NL, received_NL = torch.randint(most + 1, shape), torch.randint(most + 1, shape)
    splits = read_splits(sent_NL, received_NL, int(sent_NL.sum()))
    assert splits.send_N == [sum(row) for row in sent_NL.tolist()] and splits.receive_N == [
        sum(row) for row in received_NL.tolist()
    ]
    plan = plan_expert_order(received_NL, sum(splits.receive_N))
    ranks, experts = shape
    rows = [(rank, expert, i) for rank in range(ranks) for expert in range(experts) for i in range(int(received_NL[rank, expert]))]
    arrived = [rows[place] for place in plan.order_A.tolist()]
    assert arrived == sorted(rows, key=lambda row: (row[1], row[0], row[2]))
    assert [arrived[place] for place in plan.inverse_A.tolist()] == rows


def test_reorder_and_its_gradient() -> None:
    torch.manual_seed(0)
    order = torch.randperm(6)
    rows = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(reorder(rows, order, order.argsort()), rows[order])
    assert torch.autograd.gradcheck(lambda x: reorder(x, order, order.argsort()), (rows,))


@ALL
@pytest.mark.parametrize("dropped", [None, 0.4])
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_device(ranks: Any, config: ParallelConfig, world: int, tokens: list[int], dropped: float | None) -> None:
    """Compares outputs and gradients of tokens and weights rank by rank; gradients of experts are sums over all tokens."""
    torch.manual_seed(0)
    assert_ranks_equal_one_device(ranks, config, [random_tokens(count, dropped) for count in tokens[:world]])


@ALL
def test_all_tokens_to_one_expert(ranks: Any, config: ParallelConfig) -> None:
    """Three of four ranks receive nothing."""
    torch.manual_seed(0)
    parts = [random_tokens(5, None, top_k=1) for _ in range(4)]
    for part in parts:
        part["experts_TK"][:] = 3
    assert_ranks_equal_one_device(ranks, config, parts)


@ALL
def test_any_number_of_experts_per_token(ranks: Any, config: ParallelConfig) -> None:
    """As in expert choice: a column for each expert, and some tokens without any."""
    torch.manual_seed(0)
    parts = [random_tokens(5, 0.6, EXPERTS) for _ in range(4)]
    for part in parts:
        part["experts_TK"][:] = torch.arange(EXPERTS)
        part["kept_TK"][2] = False
    assert_ranks_equal_one_device(ranks, config, parts)


@ALL
def test_null_experts_get_nothing(ranks: Any, config: ParallelConfig) -> None:
    torch.manual_seed(0)
    parts = [random_tokens(6, None, columns=EXPERTS + 4) for _ in range(4)]
    for part in parts:
        part["kept_TK"] = part["experts_TK"] < EXPERTS
        assert not part["kept_TK"].all()
    assert_ranks_equal_one_device(ranks, config, parts)


@pytest.mark.parametrize("name", [name for name in EXCHANGES if "chunks" not in name])
def test_padding_reaches_the_experts(ranks: Any, name: str) -> None:
    """Each expert gets its maximum of rows from each rank: here 5 from each of 4."""
    torch.manual_seed(0)
    parts = [random_tokens(5, 0.3) | {"padded_rows": 5} for _ in range(4)]
    for of_rank in assert_ranks_equal_one_device(ranks, EXCHANGES[name], parts):
        assert of_rank["counts_L"].tolist() == [20, 20]


WAITS = {"plain": 1, "deduplicated": 1, "hierarchical": 2, "gather": 2}
"""How often the host waits for the device in a layer's dispatch and combine, backward included."""
FILES = {"plain": "all_to_all.py", "deduplicated": "deduplicated.py", "hierarchical": "deduplicated.py", "gather": "all_gather.py"}


@pytest.mark.parametrize("name", WAITS)
@pytest.mark.parametrize("dropped", [None, 0.3])
def test_the_host_waits_as_often_as_said(ranks: Any, name: str, dropped: float | None) -> None:
    """With dropping the plain exchange reads one more number, that of kept choices."""
    torch.manual_seed(0)
    parts = [random_tokens(count, dropped) for count in (7, 1, 4, 2)]
    expected = {f"parallel/dispatch/{FILES[name]}": WAITS[name]}
    if name == "plain" and dropped is not None:
        expected["moe/dispatch.py"] = 1
    assert ranks(4, waits, EXCHANGES[name], parts) == 4 * [expected]


def waits(config: ParallelConfig, parts: list[dict[str, Any]]) -> dict[str, int]:
    """Returns how often the host waits, by file."""
    config.expert = len(parts)
    mesh = build_mesh(config)
    dispatcher, part = build_dispatcher(EXPERTS, mesh, config), parts[mesh.rank]
    places = host_reads(lambda: pass_rows(dispatcher, part), torch.device("cpu"))
    files: Counter[str] = Counter()
    for place, count in places.items():
        files[place.partition(":")[0]] += count
    return dict(files)


def pass_rows(dispatcher: Dispatcher, part: dict[str, Any]) -> None:
    """Forward and backward with experts that double each row."""
    x_TD, weights_TK = part["x_TD"].clone().requires_grad_(), part["weights_TK"].clone().requires_grad_()
    routing = Routing(part["experts_TK"], weights_TK, part["kept_TK"], None, None)  # pyright: ignore[reportArgumentType]
    y_TD, *_ = dispatcher.run(x_TD, routing, lambda x_RD, _: 2 * x_RD, lambda: lambda: None)
    y_TD.square().sum().backward()


@pytest.mark.parametrize("name", WAITS)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(64, 8, 3), (48, 32, 8), (1, 8, 3), (32, 4, 4)])
def test_a_dry_run_goes_on_with_numbers_that_fit_each_other(name: str, tokens: int, experts: int, top_k: int) -> None:
    """No number is read; about as many rows arrive as are chosen, and the sizes of the backward pass agree."""
    dispatcher, arrived = dry_dispatcher(name, experts), []
    with FakeTensorMode(), dry_run("cuda") as seen:
        part = random_tokens(tokens, None, top_k, experts)
        weights_TK, x_TD = part["weights_TK"].requires_grad_(), part["x_TD"].requires_grad_()
        routing = Routing(part["experts_TK"], weights_TK, None, None, None)  # pyright: ignore[reportArgumentType]
        y_TD, _, rows, _ = dispatcher.run(
            x_TD, routing, lambda x_RD, _: arrived.append(len(x_RD)) or 2 * x_RD, lambda: lambda: None
        )
        y_TD.square().sum().backward()
    assert seen.waits.total() == WAITS[name] and x_TD.grad is not None and y_TD.shape == x_TD.shape
    assert arrived == [rows] and abs(rows - tokens * top_k) <= 4 * top_k


def dry_dispatcher(name: str, experts: int) -> Dispatcher:
    """Returns the dispatcher of rank 1 of 4, whose collectives do nothing."""

    def axis(size: int) -> Axis:
        group = ProcessGroup(1, size)
        group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.CUSTOM, FakeProcessGroup._create_internal(1, size))
        return Axis(size, 1, group)

    match name:
        case "plain":
            return AllToAllDispatcher(experts, axis(4))
        case "gather":
            return AllGatherDispatcher(experts, axis(4))
        case _:
            return DeduplicatedDispatcher(experts, [axis(4)] if name == "deduplicated" else [axis(2), axis(2)])


def assert_ranks_equal_one_device(ranks: Any, config: ParallelConfig, parts: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    found = ranks(len(parts), spread, config, parts)
    expected = [moe(LocalDispatcher(EXPERTS), all_experts(), part) for part in parts]
    for of_rank, reference in zip(found, expected, strict=True):
        for name in ("y_TD", "x_TD", "weights_TK", "overlapped"):
            torch.testing.assert_close(of_rank[name], reference[name], rtol=1e-12, atol=1e-13)
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        summed = torch.stack([reference[name] for reference in expected]).sum(0)
        torch.testing.assert_close(torch.cat([of_rank[name] for of_rank in found]), summed, rtol=1e-12, atol=1e-13)
    return found


def spread(config: ParallelConfig, parts: list[dict[str, Any]]) -> dict[str, Tensor]:
    config.expert = len(parts)
    mesh, experts = build_mesh(config), all_experts()
    axis = mesh.axis("expert")
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, torch.nn.Parameter(parameter.detach().chunk(axis.size)[axis.rank].clone()))
    return moe(build_dispatcher(EXPERTS, mesh, config), experts, parts[axis.rank])


def moe(dispatcher: Dispatcher, experts: Experts, part: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs, gradients of the sum of their squares, and what the overlap function gave, from the same tokens."""
    x_TD, weights_TK = part["x_TD"].clone().requires_grad_(), part["weights_TK"].clone().requires_grad_()
    routing = Routing(part["experts_TK"], weights_TK, part["kept_TK"], None, part.get("padded_rows"))  # pyright: ignore[reportArgumentType]
    seen: list[Tensor] = []

    def compute(x_RD: Tensor, counts_E: Tensor) -> Tensor:
        seen.append(counts_E)
        return experts(x_RD, counts_E)

    y_TD, overlapped, *_ = dispatcher.run(x_TD, routing, compute, lambda: x_TD.sin)
    (y_TD.square() + overlapped).sum().backward()
    leaves = {"x_TD": x_TD, "weights_TK": weights_TK, **dict(experts.named_parameters())}
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"y_TD": y_TD.detach(), "overlapped": overlapped.detach(), "counts_L": torch.stack(seen).sum(0)} | gradients


def random_tokens(tokens: int, dropped: float | None, top_k: int = TOP_K, columns: int = EXPERTS) -> dict[str, Any]:
    return {
        "x_TD": torch.randn(tokens, WIDTH, dtype=torch.float64),
        "experts_TK": torch.rand(tokens, columns).argsort(1)[:, :top_k],
        "weights_TK": torch.rand(tokens, top_k, dtype=torch.float64),
        "kept_TK": None if dropped is None else torch.rand(tokens, top_k) >= dropped,
    }


def all_experts() -> Experts:
    generator = torch.Generator().manual_seed(1)
    experts = Experts(EXPERTS, WIDTH, HIDDEN, torch.float64, bias=True)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return experts
