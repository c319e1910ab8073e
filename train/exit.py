"""Why a run ends before its last step. All ranks raise the same one after the same step."""

from enum import IntEnum

import torch.distributed as dist

from ..data.errors import DataStop
from ..parallel.process_group import is_first
from ..parallel.progress import PROGRESS
from .config.complain import say

# How a run ended, as the exit code of its process. Those of sysexits.h where one fits, so that none is that of a signal.


class ExitCode(IntEnum):
    """docs/running.md has the same list in words; a test compares them."""

    done = 0
    """The last step is done, or the run was asked to stop and its checkpoint is durable."""
    error = 1
    """An error with a traceback; or a point of a sweep failed."""
    bad_configuration = 2
    """One line says what to change; nothing was started."""
    bad_data = 65
    """More bad rows than data.max_bad_fraction, or rows that cannot be read; a checkpoint was written."""
    hang = 69
    """A collective did not complete in parallel.timeout_seconds; the stacks of all ranks are in the run folder."""
    not_finite = 70
    """NaN, infinite or far too large a number, and the policy is to stop; the checkpoint is of the step before."""
    ranks_differ = 71
    """Copies of a weight differ between ranks and could not be repaired; no checkpoint was written of that."""
    dry_step = 73
    """What the run needs is not there: memory, disk, or a folder that takes a checkpoint."""
    failed_writer = 74
    """A checkpoint could not be written, and the policy is to stop."""
    data_unavailable = 75
    """A source did not answer for data.patience_seconds; a checkpoint was written, the same command goes on."""


_said: BaseException | None = None


class RunStop(Exception):
    """The text says why, in words."""

    def __init__(self, text: str, code: ExitCode, saves: bool = True) -> None:
        """`saves`: whether the state is sound, so that a checkpoint may be written of it."""
        super().__init__(text)
        self.exit_code = int(code)
        self.saves = saves


def say_stop(stop: DataStop | RunStop, step: int) -> int:
    """Tell why the run ends after `step`. Returns the exit code."""
    if is_first():
        say(f"stopped after step {step}: {stop}")
    return stop.exit_code


def say_failure(error: BaseException) -> None:
    """Before this rank leaves and the others fail with it: which rank it was, and what it did. Once for an error."""
    global _said
    if dist.is_initialized() and error is not _said:
        _said = error
        say(f"{place()}: {in_one_line(error)}")


def place() -> str:
    """Where the thread that trains is on this rank, in words."""
    layer = "" if PROGRESS.layer is None else f", layer {PROGRESS.layer}"
    within = f", in {PROGRESS.collective}" if PROGRESS.collective else ""
    return f"rank {dist.get_rank()}, step {PROGRESS.step}, {PROGRESS.phase}{layer}{within}"


def in_one_line(error: BaseException) -> str:
    """Type and text."""
    return " ".join(f"{type(error).__name__}: {error}".split())
