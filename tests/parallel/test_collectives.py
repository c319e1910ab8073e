"""The collectives and their gradients on real ranks, against slices and sums of what one process would hold."""

from typing import Any, NamedTuple

import pytest
import torch
from tokenyard.parallel.collectives import gather_sequence, max_over, scatter_sequence, stack_over, sum_over, swap_parts
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


@WORLDS
def test_swap_parts(ranks: Any, world: int) -> None:
    torch.manual_seed(0)
    x_NNA, weights_NNA = torch.randn(world, world, 3), torch.randn(world, world, 3)
    for rank, result in enumerate(ranks(world, swap, x_NNA, weights_NNA)):
        assert torch.equal(result.output, x_NNA[:, rank])
        assert torch.equal(result.gradient, weights_NNA[:, rank])


def swap(x_NNA: Tensor, weights_NNA: Tensor) -> Pass:
    axis = everyone()
    return there_and_back(x_NNA[axis.rank], weights_NNA[axis.rank], lambda x: swap_parts(x, axis))


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
    assert gather_sequence(x, alone) is x and scatter_sequence(x, alone) is x and swap_parts(x, alone) is x
    assert sum_over(x, alone) is x and max_over(x, alone) is x and torch.equal(stack_over(x, alone), x[None])


def everyone() -> Axis:
    return build_mesh(ParallelConfig()).everyone


def there_and_back(x: Tensor, weight: Tensor, function: Any) -> Pass:
    x = x.clone().requires_grad_()
    output = function(x)
    (gradient,) = torch.autograd.grad(output, x, weight)
    return Pass(output.detach(), gradient)
