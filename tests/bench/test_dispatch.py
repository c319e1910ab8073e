"""The benchmark of the exchanges: what it counts is what was sent, and the deduplicated exchange sends hardly more than it must."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tokenyard.bench.comm_trace import Traffic
from tokenyard.bench.dispatch import ExchangeResult, measure, table
from tokenyard.parallel.collectives import all_gather


def test_bytes_are_those_that_leave_the_rank(ranks: Any) -> None:
    """Rank 0 sends 1 row to itself and 2 to rank 1, rank 1 none and 5; both gather 3 int64; then 2 fp32 each to each."""
    for rank, (sent, total, between) in enumerate(ranks(2, send)):
        assert sent == [[1 * 6 + 24 + 8, 2 * 6 + 24 + 8], [24 + 8, 5 * 6 + 24 + 8]][rank]
        assert total == between == sent[1 - rank]


def send() -> tuple[list[int], int, int]:
    splits = [[1, 2], [0, 5]]
    rank = dist.get_rank()
    came = [row[rank] for row in splits]
    with Traffic() as traffic:
        rows = torch.zeros(sum(splits[rank]), 3, dtype=torch.bfloat16)
        dist.all_to_all_single(torch.empty(sum(came), 3, dtype=torch.bfloat16), rows, came, splits[rank])
        all_gather(torch.empty(6, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
        dist.all_to_all_single(torch.empty(4), torch.zeros(4))
    return traffic.sent, traffic.total(), traffic.between_nodes(1)


def test_an_unknown_collective_is_not_overlooked(ranks: Any) -> None:
    assert all("allreduce_" in message for message in ranks(2, reduce_unseen))


def reduce_unseen() -> str:
    with Traffic(), pytest.raises(AssertionError) as raised:
        dist.all_reduce(torch.zeros(1))
    return str(raised.value)


@pytest.fixture(scope="module")
def lines(ranks: Any) -> dict[tuple[str, str], ExchangeResult]:
    found = ranks(4, measure, 64, 1024, 1, ["mixtral", "qwen3", "deepseek_v3"])
    return {(line.routing, line.exchange): line for line in (ExchangeResult(*line) for line in found[0])}


@pytest.mark.parametrize("routing", ["mixtral", "qwen3", "deepseek_v3"])
def test_the_deduplicated_exchange_is_within_two_percent_of_the_bound(
    lines: dict[tuple[str, str], ExchangeResult], routing: str
) -> None:
    for line in (lines[routing, "deduplicated"], lines[routing, "deduplicated, e4m3"]):
        assert line.forward_bound_bytes < line.forward_bytes < 1.02 * line.forward_bound_bytes
        assert line.bound_bytes < line.backward_bytes < 1.02 * line.bound_bytes


def test_tokens_in_e4m3_save_what_they_are_narrower_by(lines: dict[tuple[str, str], ExchangeResult]) -> None:
    """1 byte instead of 2 for each of 1024 numbers, and 8 bytes of scales, of every row that leaves the rank; nothing backward."""
    for (routing, exchange), line in lines.items():
        if not exchange.endswith("e4m3"):
            narrow = lines[routing, f"{exchange}, e4m3"]
            rows = {"plain": line.backward_bytes / 4096, "gather": 64 * 3}.get(exchange)
            if rows is not None:
                assert line.forward_bytes - narrow.forward_bytes == rows * (2048 - 1024 - 8)
            assert narrow.forward_bytes < 0.78 * line.forward_bytes and narrow.backward_bytes == line.backward_bytes


def test_what_each_exchange_sends(lines: dict[tuple[str, str], ExchangeResult]) -> None:
    """Plain: a row for each choice elsewhere; gather: three rows of each token, each way. Nodes of two ranks."""
    tokens, row = 64, 2048
    for routing, top_k in (("mixtral", 2), ("qwen3", 8), ("deepseek_v3", 8)):
        plain, hierarchical = lines[routing, "plain"], lines[routing, "hierarchical"]
        assert plain.forward_bytes == pytest.approx(2 * tokens * top_k * row * 3 / 4, rel=0.1)
        assert lines[routing, "gather"].forward_bytes == pytest.approx(2 * tokens * row * 3, rel=0.04)
        assert hierarchical.between_nodes_bytes < lines[routing, "deduplicated"].between_nodes_bytes < plain.between_nodes_bytes
        assert hierarchical.between_nodes_bytes < 4 * tokens * row * 1.02
    assert table(list(lines.values())).count("\n") == 25
