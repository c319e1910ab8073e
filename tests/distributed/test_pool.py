"""The pool of ranks: results, tensors, classes and errors travel; a rank that hangs or dies fails the test by name."""

import os
import time
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist


class Pair(NamedTuple):
    rank: int
    tensor: torch.Tensor


def echo(pair, scale=1):
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    return Pair(dist.get_rank(), pair.tensor * scale), total.item(), os.getpid(), torch.get_num_threads()


def give_back(tensors):
    return tensors


def fail_on_last():
    if dist.get_rank() == dist.get_world_size() - 1:
        raise KeyError("the last rank's reason")
    dist.barrier()


def hang_on_first():
    if dist.get_rank() == 0:
        time.sleep(60)


def die_on_first():
    if dist.get_rank() == 0:
        print("last words", flush=True)
        os._exit(7)


def draw():
    torch.set_default_dtype(torch.float64)
    return torch.rand(2)


def test_results_and_classes_travel(ranks):
    results = ranks(2, echo, Pair(9, torch.tensor([1.5, 2.5])), scale=2)
    assert [result[0].rank for result in results] == [0, 1]
    assert all(isinstance(result[0], Pair) and torch.equal(result[0].tensor, torch.tensor([3.0, 5.0])) for result in results)
    assert all(result[1] == 3.0 and result[3] == 1 for result in results)
    again = ranks(2, echo, Pair(0, torch.zeros(1)))
    assert [result[2] for result in again] == [result[2] for result in results], "the same processes answer"


def test_every_dtype_and_shape_travels(ranks):
    tensors = [
        torch.tensor(3, dtype=torch.int64),
        torch.zeros(0, 4, dtype=torch.bfloat16),
        torch.arange(6, dtype=torch.float64).reshape(2, 3).T,
        torch.tensor([True, False]),
        torch.tensor([float("nan"), -0.0], dtype=torch.float16),
    ]
    for got in ranks(2, give_back, tensors):
        for one, other in zip(got, tensors, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other) or one.isnan().any()
            assert one.shape == other.shape


def test_each_call_starts_from_the_same_seed_and_default_dtype(ranks):
    torch.manual_seed(0)
    expected = torch.rand(2, dtype=torch.float64)
    assert all(torch.equal(one, expected) for _ in range(2) for one in ranks(2, draw))


def test_an_error_brings_its_traceback_and_names_the_ranks_that_wait(ranks):
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 raised.*in fail_on_last.*last rank's reason.*no answer from rank 0 within"):
        ranks(2, fail_on_last)
    assert ranks(2, give_back, 5) == [5, 5], "a new pool took over"


def test_a_rank_that_hangs_is_named(ranks):
    with pytest.raises(RuntimeError, match=r"hang_on_first: no answer from rank 0 within 0\.5 s"):
        ranks(2, hang_on_first, limit_seconds=0.5)


def test_a_rank_that_dies_is_named_with_its_last_output(ranks):
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 died with exit code 7.*last words"):
        ranks(2, die_on_first)


def test_a_local_function_is_refused(ranks):
    with pytest.raises(ValueError, match="must stand at top level"):
        ranks(2, lambda: None)
