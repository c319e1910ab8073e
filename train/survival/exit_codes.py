"""How a run ended, as the exit code of its process. Those of sysexits.h where one fits, so that none is that of a signal."""

from enum import IntEnum


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
