"""How a run ends before its last step: exit codes, the error that all ranks raise, and the note of a rank that fails alone."""

import json
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from ..data.errors import DataStop
from ..parallel.config import ParallelConfig
from ..parallel.process_group import is_first
from ..parallel.progress import PROGRESS
from .config.complain import say
from .config.redact import redact_plain


class ExitCode(IntEnum):
    """The exit code of a run's process, from sysexits.h where one fits, so that none is that of a signal.

    docs/running.md has the same list in words; a test compares them.
    """

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
    overflow = 78
    """Rows did not fit into the room of exchange=symmetric, and the policy is to stop; the checkpoint is of the step before."""


class RunStop(Exception):
    """Ends a run. All ranks raise it after the same step; the text says why."""

    def __init__(self, text: str, code: ExitCode, saves: bool = True) -> None:
        """`saves`: whether the state is sound, so that a checkpoint may be written of it."""
        super().__init__(text)
        self.exit_code = int(code)
        self.saves = saves


def too_little_room(parallel: ParallelConfig, overflow: int) -> str:
    """Returns, in one line, which setting of the exchange left no room for `overflow` rows, and values that do."""
    rule = f"must leave room for the rows of each rank's experts, and {overflow} did not fit"
    right = f"parallel.exchange_rows={float(parallel.expert)}, where all fit, or parallel.exchange_overflow=repair or drop"
    return f"parallel.exchange_rows={parallel.exchange_rows}: {rule}; nearest valid: {right}"


_reported: BaseException | None = None


def report_stop(stop: DataStop | RunStop, step: int) -> int:
    """Prints why the run ends after `step`. Returns the exit code."""
    if is_first():
        say(f"stopped after step {step}: {stop}")
    return stop.exit_code


def report_failure(error: BaseException) -> None:
    """Prints which rank failed and what it was doing, once for an error, before this rank leaves and the others fail with it."""
    global _reported
    if dist.is_initialized() and error is not _reported:
        _reported = error
        say(f"{place()}: {in_one_line(error)}")


def place() -> str:
    """Returns where the training thread of this rank is, in words."""
    layer = "" if PROGRESS.layer is None else f", layer {PROGRESS.layer}"
    within = f", in {PROGRESS.collective}" if PROGRESS.collective else ""
    return f"rank {dist.get_rank()}, step {PROGRESS.step}, {PROGRESS.phase}{layer}{within}"


def in_one_line(error: BaseException) -> str:
    """Returns type and text of an error."""
    return " ".join(f"{type(error).__name__}: {error}".split())


# A rank that fails while the others wait for it leaves a note in the run folder, which ends them within seconds. They may be in a
# collective that runs on their GPUs, which only the end of the process interrupts. The watchdogs look for the note.

STACKS = "stacks"
"""The folder in the run folder for what ranks report when the job hangs or one of them fails."""
NOTE = f"{STACKS}/failed.json"


class Failure(NamedTuple):
    rank: int
    step: int
    """Optimizer steps done."""
    text: str
    code: int
    """The exit code of all ranks."""
    start: str = ""
    """The start of the run that it is about, if that matters: a hang is one of those ranks alone."""


def leave_note(folder: Path, failure: Failure, name: str = NOTE) -> bool:
    """Writes the note for the other ranks of the run in `folder`. Returns whether this did: not if there is one, or no room."""
    note = folder / name
    temporary = note.with_name(f"{note.name}.{failure.rank}.tmp")
    with suppress(OSError):
        note.parent.mkdir(exist_ok=True)
        if not note.exists():
            temporary.write_text(json.dumps(redact_plain(failure)))
            try:
                note.hardlink_to(temporary)  # unlike a rename, for one rank only
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                temporary.replace(note)
            finally:
                temporary.unlink(missing_ok=True)
            return True
    return False


def find_note(folder: Path) -> Failure | None:
    """Returns what a rank has written since `remove_notes`, None if there is nothing."""
    return read_note(folder / NOTE)


def read_note(path: Path) -> Failure | None:
    """Returns what `leave_note` has written, None if there is nothing."""
    with suppress(OSError, ValueError, TypeError):
        return Failure(*json.loads(path.read_text()))
    return None


def remove_notes(folder: Path) -> None:
    """Removes the notes of an earlier start, but not its stacks; called by rank 0 before the ranks meet."""
    for path in (folder / STACKS).glob("*.json"):
        path.unlink(missing_ok=True)
