"""Flags that the ranks exchange in every step, in front of the numbers that are summed over all ranks anyway.

The host reads them before the update: a gradient that is not finite on any rank must be known to all ranks before one of them
changes a weight. That copies some 60 bytes, at a point where a GPU has only the update left to do in this step. Apart from the
layers it is the only time a step waits for the device.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..moe.device import host_read
from ..parallel.progress import waiting_for_device
from ..parallel.streams import on_device


class RankFlags(NamedTuple):
    """The flags of one rank."""

    stop: bool = False
    """It was asked to stop."""
    save: bool = False
    """It was asked to save."""
    bad_data: bool = False
    """It could not read its rows, and trained on none."""
    failed_writer: bool = False
    """A checkpoint that it was writing failed."""
    writing: bool = False
    """It is writing a checkpoint."""
    seconds: float | None = None
    """Its own working time in a step; None except on the steps on which all ranks report it."""
    snapshot: bool = False
    """It was asked for a snapshot of memory."""


NO_FLAGS = RankFlags()


class GlobalFlags(NamedTuple):
    """The flags of all ranks, the same on each of them. A flag is the number of ranks that set it."""

    stop: int
    save: int
    bad_data: int
    failed_writer: int
    writing: int
    not_finite: int
    """Ranks with a loss or a gradient that is NaN or infinite."""
    rank: int | None
    """The rank with bad data, a failed writer or a number that is not finite, if there is exactly one."""
    seconds: list[float]
    """The working time of each rank, empty if it was not reported."""
    gradient_norm: float
    loss: float
    overflow: int = 0
    """Choices that the exchange had no room for, if parallel.exchange_overflow=fatal; else 0."""
    snapshot: int = 0


def is_sound(global_flags: GlobalFlags) -> bool:
    """Whether an update may use the step."""
    if global_flags.bad_data or global_flags.overflow:
        return False
    return math.isfinite(global_flags.loss) and math.isfinite(global_flags.gradient_norm)


def encode_flags(rank_flags: RankFlags, mine: Tensor, rank: int, world: int) -> Tensor:
    """Returns this rank's flags as fp64 numbers to be summed over the ranks. `mine`: this rank's part of all other numbers."""
    flags = [getattr(rank_flags, name) for name in ("stop", "save", "bad_data", "failed_writer", "writing", "snapshot")]
    failed_rank = rank + 1 if rank_flags.bad_data or rank_flags.failed_writer else 0
    seconds = [] if rank_flags.seconds is None else [rank_flags.seconds if slot == rank else 0.0 for slot in range(world)]
    not_finite = (~mine.isfinite()).any().double().view(1)
    own = on_device(torch.tensor([*flags, failed_rank, *seconds], dtype=mine.dtype), mine.device)
    return torch.cat([not_finite, not_finite * (rank + 1), own])


def read_flags(numbers: Tensor, tokens: int | Tensor, overflow: Tensor | None = None) -> tuple[GlobalFlags, int]:
    """Returns the flags, and the tokens of the step. The host waits for the device.

    `numbers`: the encoded flags, the squared norm and the loss, summed over all ranks. `overflow`: scalar, if it is fatal.
    """
    if overflow is not None:
        numbers = torch.cat([numbers, overflow.view(1).to(numbers.dtype)])
    if isinstance(tokens, Tensor):
        numbers = torch.cat([numbers, tokens.view(1).to(numbers.dtype)])
    with waiting_for_device():
        values = host_read(numbers, "flags, loss and norm", lambda: [0.0] * len(numbers))
    if isinstance(tokens, Tensor):
        tokens = int(values.pop())
    overflown = 0 if overflow is None else int(values.pop())
    not_finite, not_finite_ranks, *flags, failed_ranks = values[:9]
    stop, save, bad_data, failed_writer, writing, snapshot = map(int, flags)
    *seconds, squared, loss = values[9:]
    single = not_finite_ranks if not_finite == 1 else failed_ranks if bad_data + failed_writer == 1 else 0
    norm = math.sqrt(squared) if squared >= 0 else math.nan
    rank = int(single) - 1 if single else None
    counts = (stop, save, bad_data, failed_writer, writing, int(not_finite))
    return GlobalFlags(*counts, rank, seconds, norm, loss, overflown, snapshot), tokens
