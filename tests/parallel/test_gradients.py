"""Gradients over ranks: sums in buckets, and a norm that counts each shard once."""

from typing import Any

import pytest
import torch
from tokenyard.parallel import gradients
from tokenyard.parallel.apply import Parallel, ShardedParameter
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import Axis, build_mesh
from tokenyard.parallel.shard import whole
from torch import Tensor

SHAPES = [(3, 4), (5,), (2, 2, 2), (50,), (1,), (4, 3)]


@pytest.mark.parametrize("bucket", [1, 12, 20, 10**6])
def test_replicas_are_summed_and_others_are_not(ranks: Any, bucket: int) -> None:
    """The fourth parameter has no replicas; the fifth has no gradient on any rank; one rank's last is strided."""
    torch.manual_seed(0)
    parts = [[torch.randn(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(2)]
    found = ranks(2, reduce_in_buckets, parts, bucket)
    for rank, reduced in enumerate(found):
        for index, gradient in enumerate(reduced):
            both = parts[0][index] + parts[1][index]
            expected = parts[rank][index] if index == 3 else torch.zeros(1) if index == 4 else both
            assert torch.equal(gradient, expected.to(gradient.dtype))


def reduce_in_buckets(parts: list[list[Tensor]], bucket: int) -> list[Tensor]:
    mesh = build_mesh(ParallelConfig())
    parallel = sharded([mesh.everyone if i != 3 else Axis(1, 0, None) for i in range(len(SHAPES))], parts[mesh.rank])
    parameters = [p.parameter for p in parallel.parameters.values()]
    parameters[4].grad = None
    if mesh.rank == 0:
        parameters[5].grad = parts[0][5].T.contiguous().T
    usual, gradients.BUCKET = gradients.BUCKET, bucket
    try:
        with gradients.gradient_all_reduce(parallel):
            pass
    finally:
        gradients.BUCKET = usual
    return [p.grad for p in parameters if p.grad is not None]


def test_biases_that_one_rank_of_a_tensor_group_adds_hold_up_no_other_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some ranks never have a gradient of theirs, so the ranks cannot agree on when to start it: it starts at the end."""
    names = ["embedding", "attention.o.weight", "attention.o.bias", "moe.experts.up", "moe.experts.down_bias"]
    parallel = sharded([Axis(2, 0, object())] * 5, [torch.ones(3)] * 5)  # pyright: ignore[reportArgumentType]
    parallel.parameters = dict(zip(names, parallel.parameters.values(), strict=True))
    name_of, started = {id(sharded): name for name, sharded in parallel.parameters.items()}, list[str]()
    monkeypatch.setattr(gradients._Bucket, "start", lambda bucket: started.extend(name_of[id(member)] for member in bucket.members))
    reducer = gradients._Reducer(parallel)
    for name in names:
        if not name.endswith("bias"):
            reducer.on_gradient(parallel.parameters[name].parameter)
    assert started == ["embedding", "attention.o.weight", "moe.experts.up"]


def test_each_rank_contributes_its_share_of_the_squared_norm() -> None:
    """Each of the 4 replicas of a shard counts a quarter of it."""
    values = [torch.full((3,), 2.0), torch.full((2, 2), 3.0)]
    parallel = sharded([Axis(1, 0, None), Axis(4, 2, None)], values)
    squared = gradients.squared_norm(parallel)
    assert squared.dtype == torch.float64 and squared.item() == pytest.approx(3 * 4 + 4 * 9 / 4, rel=1e-6)
    gradients.scale_gradients(parallel, torch.tensor(0.5, dtype=torch.float64))
    assert gradients.squared_norm(parallel).item() == pytest.approx((3 * 4 + 4 * 9 / 4) / 4, rel=1e-6)


def sharded(axes: list[Axis], values: list[Tensor]) -> Parallel:
    parallel = Parallel(model=None, mesh=None, device=torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    for index, (axis, value) in enumerate(zip(axes, values, strict=True)):
        parameter = torch.nn.Parameter(torch.zeros_like(value))
        parameter.grad = value.clone()
        parallel.parameters[str(index)] = ShardedParameter(parameter, whole(value.shape), axis)
    return parallel
