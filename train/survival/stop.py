"""Why a run ends before its last step. All ranks raise the same one after the same step."""

import torch.distributed as dist

from ...data.errors import DataStop
from ...parallel.process_group import is_first
from ...parallel.progress import PULSE
from ..config.complain import say
from .exit_codes import ExitCode

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
    layer = "" if PULSE.layer is None else f", layer {PULSE.layer}"
    within = f", in {PULSE.collective}" if PULSE.collective else ""
    return f"rank {dist.get_rank()}, step {PULSE.step}, {PULSE.phase}{layer}{within}"


def in_one_line(error: BaseException) -> str:
    """Type and text."""
    return " ".join(f"{type(error).__name__}: {error}".split())
