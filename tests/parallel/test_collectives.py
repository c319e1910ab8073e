"""The collectives and their gradients on real ranks, against slices and sums of what one process would hold."""

from typing import Any, NamedTuple

import pytest
import torch
from tokenyard.parallel.collectives import exchange_rows, gather_sequence, max_over, scatter_sequence, stack_over, sum_over
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import Axis, build_mesh
from torch import Tensor

WORLDS = pytest.mark.parametrize("world", [2, 4])


class Pass(NamedTuple):
    output: Tensor
    gradient: Tensor


@WORLDS
def test_gather_sequence(ranks: Any, world: int) -> None:
    torch.manual_seed(0)
    x_BSD, weights_NBSD = torch.randn(2, 4 * world, 3), torch.randn(world, 2, 4 * world, 3)
    for rank, result in enumerate(ranks(world, gather, x_BSD, weights_NBSD)):
        assert torch.equal(result.output, x_BSD)
        torch.testing.assert_close(result.gradient, weights_NBSD.sum(0).chunk(world, 1)[rank])


def gather(x_BSD: Tensor, weights_NBSD: Tensor) -> Pass:
    axis = everyone()
    return there_and_back(x_BSD.chunk(axis.size, 1)[axis.rank], weights_NBSD[axis.rank], lambda x: gather_sequence(x, axis))


@WORLDS
def test_scatter_sequence(ranks: Any, world: int) -> None:
    torch.manual_seed(0)
    parts_NBSD, weights_BSD = torch.randn(world, 2, 4 * world, 3), torch.randn(2, 4 * world, 3)
    for rank, result in enumerate(ranks(world, scatter, parts_NBSD, weights_BSD)):
        torch.testing.assert_close(result.output, parts_NBSD.sum(0).chunk(world, 1)[rank])
        assert torch.equal(result.gradient, weights_BSD)


def scatter(parts_NBSD: Tensor, weights_BSD: Tensor) -> Pass:
    axis = everyone()
    weight = weights_BSD.chunk(axis.size, 1)[axis.rank]
    return there_and_back(parts_NBSD[axis.rank], weight, lambda x: scatter_sequence(x, axis))


COUNTS = {
    2: [[[2, 3], [0, 1]], [[0, 0], [0, 4]], [[0, 0], [0, 0]], [[0, 5], [0, 0]]],
    4: [[[1, 0, 3, 2], [0, 0, 0, 0], [4, 1, 0, 0], [0, 2, 1, 1]], [[0, 0, 3, 0]] * 4],
}


@pytest.mark.parametrize(("world", "counts"), [(world, counts) for world, cases in COUNTS.items() for counts in cases])
def test_exchange_rows(ranks: Any, world: int, counts: list[list[int]]) -> None:
    """Row i of those from rank a to rank b is [a, b, i]; gradients come back as the weights of where the rows went."""
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
    return there_and_back(x, weights[axis.rank], lambda x: exchange_rows(x, counts[axis.rank], receive, axis))


@WORLDS
def test_sum_maximum_and_stack(ranks: Any, world: int) -> None:
    torch.manual_seed(0)
    x_NAB = torch.randint(-99, 99, (world, 2, 3))
    for summed, largest, stacked in ranks(world, reduce, x_NAB):
        assert torch.equal(summed, x_NAB.sum(0))
        assert torch.equal(largest, x_NAB.amax(0))
        assert torch.equal(stacked, x_NAB.transpose(1, 2))


def reduce(x_NAB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    axis = everyone()
    x_AB = x_NAB[axis.rank]
    return sum_over(x_AB.clone(), axis), max_over(x_AB.clone(), axis), stack_over(x_AB.T, axis)


def test_one_rank_leaves_everything_as_it_is() -> None:
    alone, x = Axis(1, 0, None), torch.randn(2, 4, 3)
    assert gather_sequence(x, alone) is x and scatter_sequence(x, alone) is x and exchange_rows(x, [2], [2], alone) is x
    assert sum_over(x, alone) is x and max_over(x, alone) is x and torch.equal(stack_over(x, alone), x[None])


def everyone() -> Axis:
    return build_mesh(ParallelConfig()).everyone


def there_and_back(x: Tensor, weight: Tensor, function: Any) -> Pass:
    x = x.clone().requires_grad_()
    output = function(x)
    (gradient,) = torch.autograd.grad(output, x, weight)
    return Pass(output.detach(), gradient)
