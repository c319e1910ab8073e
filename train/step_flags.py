"""What ranks tell each other in every step: a few numbers in front of those that are added up over all ranks anyway.

The host reads them before the update: a gradient that is not finite on any rank must be known to all ranks before one of them
changes a weight. That is one copy of some 60 bytes, at a place where a GPU has only the update left to do in this step. Outside of
the layers it is the only wait of a step.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..moe.device import host_read
from ..parallel.progress import waiting_for_device
from ..parallel.streams import on_device


class RankFlags(NamedTuple):
    """What one rank has to tell."""

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
    """Of its own work in a step, on steps on which all ranks tell that."""


NOTHING = RankFlags()


class GlobalFlags(NamedTuple):
    """What all ranks told, on each of them. Of flags the number of ranks that set them."""

    stop: int
    save: int
    bad_data: int
    failed_writer: int
    writing: int
    not_finite: int
    """Ranks with a loss or a gradient that is NaN or infinite."""
    rank: int | None
    """The rank with bad data, a failed writer or what is not finite, if it is one alone."""
    seconds: list[float]
    """Of each rank, if they told them."""
    gradient_norm: float
    loss: float


def is_sound(global_flags: GlobalFlags) -> bool:
    """Whether an update may use it."""
    return not global_flags.bad_data and math.isfinite(global_flags.loss) and math.isfinite(global_flags.gradient_norm)


def numbers_of(rank_flags: RankFlags, mine: Tensor, rank: int, world: int) -> Tensor:
    """What this rank adds to the flags, fp64. `mine`: its part of all other numbers, which are finite if all is well."""
    flags = [rank_flags.stop, rank_flags.save, rank_flags.bad_data, rank_flags.failed_writer, rank_flags.writing]
    spoken = rank + 1 if rank_flags.bad_data or rank_flags.failed_writer else 0
    slots = [] if rank_flags.seconds is None else [rank_flags.seconds if place == rank else 0.0 for place in range(world)]
    not_finite = (~mine.isfinite()).any().double().view(1)
    own = on_device(torch.tensor([*flags, spoken, *slots], dtype=mine.dtype), mine.device)
    return torch.cat([not_finite, not_finite * (rank + 1), own])


def read(numbers: Tensor, tokens: int | Tensor) -> tuple[GlobalFlags, int]:
    """Flags, squared norm and loss, added up over all ranks; and the tokens of the step. The host waits for the device."""
    if isinstance(tokens, Tensor):
        numbers = torch.cat([numbers, tokens.view(1).to(numbers.dtype)])
    with waiting_for_device():
        values = host_read(numbers, "flags, loss and norm", lambda: [0.0] * len(numbers))
    if isinstance(tokens, Tensor):
        tokens = int(values.pop())
    not_finite, finders, stop, save, bad_data, failed_writer, writing, speakers, *seconds, squared, loss = values
    alone = finders if not_finite == 1 else speakers if bad_data + failed_writer == 1 else 0
    norm = math.sqrt(squared) if squared >= 0 else math.nan
    rank = int(alone) - 1 if alone else None
    counts = [int(count) for count in (stop, save, bad_data, failed_writer, writing, not_finite)]
    return GlobalFlags._make([*counts, rank, seconds, norm, loss]), tokens
