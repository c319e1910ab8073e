"""Started and awaited collectives, and their gradients, on real ranks: against lists of what each rank has."""

from typing import Any, NamedTuple

import pytest
import torch
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.dispatch.async_collectives import AllGather, AllToAll, ReduceScatter, Route
from tokenyard.parallel.mesh import Axis, build_mesh
from torch import Tensor


class Pass(NamedTuple):
    output: Tensor
    gradient: Tensor


COUNTS = {
    2: [[[2, 3], [0, 1]], [[0, 0], [0, 4]], [[0, 0], [0, 0]], [[0, 5], [0, 0]]],
    4: [[[1, 0, 3, 2], [0, 0, 0, 0], [4, 1, 0, 0], [0, 2, 1, 1]], [[0, 0, 3, 0]] * 4],
}


@pytest.mark.parametrize(("world", "counts"), [(world, counts) for world, cases in COUNTS.items() for counts in cases])
def test_exchange(ranks: Any, world: int, counts: list[list[int]]) -> None:
    """Row i of those from rank a to rank b is [a, b, i]; gradients are the weights at the rows' destinations."""
    torch.manual_seed(0)
    weights = [torch.randn(sum(row[rank] for row in counts), 3, dtype=torch.float64) for rank in range(world)]
    results = ranks(world, exchange, counts, weights)
    for rank, result in enumerate(results):
        expected = [[a, rank, i] for a in range(world) for i in range(counts[a][rank])]
        assert result.output.tolist() == expected
        sent = [(b, i) for b in range(world) for i in range(counts[rank][b])]
        places = [(b, sum(counts[a][b] for a in range(rank)) + i) for b, i in sent]
        assert result.gradient.tolist() == [weights[b][place].tolist() for b, place in places]


def exchange(counts: list[list[int]], weights: list[Tensor]) -> Pass:
    axis = everyone()
    rows = [[axis.rank, b, i] for b in range(axis.size) for i in range(counts[axis.rank][b])]
    x = torch.tensor(rows, dtype=torch.float64).view(-1, 3)
    receive = [row[axis.rank] for row in counts]
    return there_and_back(x, weights[axis.rank], AllToAll(counts[axis.rank], receive, axis))


SIZES = pytest.mark.parametrize("sizes", [[2, 2], [3, 0], [1, 4, 0, 2], [2, 2, 2, 2], [0, 0]])


@SIZES
def test_gather(ranks: Any, sizes: list[int]) -> None:
    """Every rank gets all rows; the gradient of a row is the sum over the ranks."""
    torch.manual_seed(0)
    rows, weights_NTD = torch.randn(sum(sizes), 3), torch.randn(len(sizes), sum(sizes), 3)
    for rank, result in enumerate(ranks(len(sizes), gather, sizes, rows, weights_NTD)):
        assert torch.equal(result.output, rows)
        torch.testing.assert_close(result.gradient, weights_NTD.sum(0).split(sizes)[rank])


def gather(sizes: list[int], rows: Tensor, weights_NTD: Tensor) -> Pass:
    axis = everyone()
    return there_and_back(rows.split(sizes)[axis.rank], weights_NTD[axis.rank], AllGather(sizes, axis))


@SIZES
def test_scatter(ranks: Any, sizes: list[int]) -> None:
    torch.manual_seed(0)
    parts_NTD, weights = torch.randn(len(sizes), sum(sizes), 3), torch.randn(sum(sizes), 3)
    for rank, result in enumerate(ranks(len(sizes), scatter, sizes, parts_NTD, weights)):
        torch.testing.assert_close(result.output, parts_NTD.sum(0).split(sizes)[rank])
        assert torch.equal(result.gradient, weights)


def scatter(sizes: list[int], parts_NTD: Tensor, weights: Tensor) -> Pass:
    axis = everyone()
    return there_and_back(parts_NTD[axis.rank], weights.split(sizes)[axis.rank], ReduceScatter(sizes, axis))


def test_narrow_parts_are_added_up_wide(ranks: Any) -> None:
    """Summed one after the other in bf16, 1 + 2**-8 + 2**-8 + 2**-8 is 1."""
    parts = torch.full((4, 4, 1), 2.0**-8, dtype=torch.bfloat16)
    parts[0] = 1.0
    for result in ranks(4, scatter, [1, 1, 1, 1], parts, torch.ones(4, 1, dtype=torch.bfloat16)):
        assert result.output.item() == torch.tensor(1 + 3 * 2.0**-8).bfloat16().item() > 1


def test_what_is_computed_in_between_does_not_disturb(ranks: Any) -> None:
    """Two collectives at once, awaited in the other order."""
    for first, second in ranks(2, two_at_once):
        assert first.tolist() == [[0.0], [1.0]] and second.tolist() == [[10.0], [11.0]]


def two_at_once() -> tuple[Tensor, Tensor]:
    axis = everyone()
    route = AllToAll([1, 1], [1, 1], axis)
    rows = torch.full((2, 1), float(axis.rank))
    one, other = route.start(rows), route.start(rows + 10)
    second = other.wait()
    return one.wait(), second


def test_one_rank_leaves_everything_as_it_is() -> None:
    x = torch.randn(2, 4)
    assert AllToAll([2], [2], Axis(1, 0, None)).start(x).wait() is x


def everyone() -> Axis:
    return build_mesh(ParallelConfig()).everyone


def there_and_back(x: Tensor, weight: Tensor, route: Route) -> Pass:
    x = x.clone().requires_grad_()
    output = route.start(x).wait()
    (gradient,) = torch.autograd.grad(output, x, weight)
    return Pass(output.detach(), gradient)
