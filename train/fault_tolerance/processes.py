"""Ends a rank with its launcher, and ends other ranks that are frozen."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

LAUNCHER = "TOKENYARD_LAUNCHER"
"""The environment variable with the process id of the launcher that starts the ranks."""
PR_SET_PDEATHSIG = 1
AFTER_SECONDS = 2
"""By then a launcher has noticed the rank that ended first."""


class Process(NamedTuple):
    host: str
    pid: int
    begin: str
    """Its start time by the clock of the kernel, which distinguishes it from other processes with this id."""


def end_with_launcher() -> None:
    """Lets the system kill this process when torch's launcher (or ours), which started it, dies. Only on Linux."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ.get(LAUNCHER, parent)):  # the launcher has died already
        os.kill(os.getpid(), signal.SIGKILL)


def this_process() -> Process:
    return Process(socket.gethostname(), os.getpid(), _begin(os.getpid()))


def end_later(processes: list[Process]) -> None:
    """Kills those of this host that still run after a moment, when this process has ended.

    A stopped process does not react to SIGTERM, and launchers wait half a minute before they send SIGKILL.
    """
    here = [p for p in processes if p.host == socket.gethostname() and p.begin and p.begin == _begin(p.pid)]
    if here:
        pids = " ".join(str(process.pid) for process in here)
        with suppress(OSError):
            subprocess.Popen(["/bin/sh", "-c", f"sleep {AFTER_SECONDS}; kill -9 {pids} 2>/dev/null"], start_new_session=True)


def _begin(pid: int) -> str:
    """Returns the start time of a process, empty if there is no /proc or no such process."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""
