"""Collectives of small Python objects. Every function is collective over the default process group, if there is one."""

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import xxhash

from .collectives import all_gather

Result = TypeVar("Result")
SUMMARY_BYTES = 24
"""Of a value that `distinct_from_all` compares: its xxh3-128 and its length."""
MESSAGE_BYTES = 1 << 24
"""Most bytes of one message of `distinct_from_all`."""


def rank_and_world() -> tuple[int, int]:
    """Returns the rank and the world size; (0, 1) without a process group. Not collective."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def any_rank(*flags: bool) -> list[bool]:
    """Returns for each flag whether any rank has set it, in one small all-reduce."""
    if not dist.is_initialized():
        return list(flags)
    values = torch.tensor(flags, dtype=torch.int32, device=message_device())
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


def distinct_from_all(mine: bytes) -> tuple[list[bytes], list[int]]:
    """Returns the distinct values of all ranks, in the order of the first ranks that hold them, and which one each rank holds.

    24 bytes a rank travel, and each distinct value once, in messages of at most `MESSAGE_BYTES`.
    """
    if not dist.is_initialized():
        return [mine], [0]
    rank, world = dist.get_rank(), dist.get_world_size()
    summary = torch.frombuffer(bytearray(xxhash.xxh3_128_digest(mine) + len(mine).to_bytes(8, "little")), dtype=torch.uint8)
    summaries = torch.empty(world * SUMMARY_BYTES, dtype=torch.uint8, device=message_device())
    all_gather(summaries, summary.to(message_device()))
    found = [bytes(row) for row in summaries.cpu().view(world, SUMMARY_BYTES).numpy()]
    number: dict[bytes, int] = {}
    held = [number.setdefault(one, len(number)) for one in found]
    ends = list(itertools.accumulate(int.from_bytes(one[16:], "little") for one in number))
    joined = torch.zeros(ends[-1], dtype=torch.uint8)
    if held.index(held[rank]) == rank and mine:  # the others add zeros
        joined[ends[held[rank]] - len(mine) : ends[held[rank]]] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    for part in joined.split(MESSAGE_BYTES):
        message = part.to(message_device())
        dist.all_reduce(message)
        part.copy_(message)
    content = joined.numpy().tobytes()
    return [content[begin:end] for begin, end in itertools.pairwise([0, *ends])], held


def message_device() -> torch.device:
    """Returns where the default group's messages must be."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


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
