"""Collectives of small Python objects. Every function is collective over the default process group, if there is one."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


def rank_and_world() -> tuple[int, int]:
    """Returns the rank and the world size; (0, 1) without a process group. Not collective."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def any_rank(*flags: bool) -> list[bool]:
    """Returns for each flag whether any rank has set it, in one small all-reduce."""
    if not dist.is_initialized():
        return list(flags)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    values = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def from_all(value: Any) -> list[Any]:
    """Returns the values of all ranks; they must be small and picklable."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(read: Callable[[], Result]) -> Result:
    """Calls `read` on rank 0 and returns the result on every rank. Its OSError or ValueError is raised on all, as a ValueError."""
    if not dist.is_initialized():
        return read()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = read()
        except (OSError, ValueError) as error:
            outcome[1] = error if isinstance(error, ValueError) else ValueError(str(error))
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def through_first(mine: Any, decide: Callable[[list[Any]], list[Any]]) -> Any:
    """Gathers `mine` on rank 0, where `decide` returns an answer for each rank. Its errors are raised on every rank."""
    if not dist.is_initialized():
        return decide([mine])[0]
    rank, world = dist.get_rank(), dist.get_world_size()
    gathered: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(mine, gathered, dst=0)
    answers: list[Any] = [None] * world
    if gathered is not None:
        try:
            answers = [(None, answer) for answer in decide(gathered)]
        except (OSError, ValueError) as error:
            answers = [(error, None)] * world
    answer: list[Any] = [None]
    dist.scatter_object_list(answer, answers if rank == 0 else None, src=0)
    failure, value = answer[0]
    if failure is not None:
        raise failure
    return value


def on_each_rank(work: Callable[[], Result], failed: str) -> Result:
    """Returns the result of `work` on this rank. If any rank's raises, every rank raises the error of the first such rank.

    A ValueError is raised as it is, any other Exception as a RuntimeError: `failed`, the rank and the error.
    """
    result: list[Result] = []
    error: Exception | None = None
    try:
        result.append(work())
    except ValueError as caught:
        error = caught
    except Exception as caught:
        error = RuntimeError(f"{failed}: rank {rank_and_world()[0]}: {type(caught).__name__}: {caught}")
    for each in from_all(error):
        if each is not None:
            raise each
    return result[0]
