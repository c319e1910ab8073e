"""The processes that belong to a rank: its launcher, with which it ends, and other ranks that are frozen."""

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
"""In the environment of ranks: the process id of the launcher that starts them."""
PR_SET_PDEATHSIG = 1
AFTER_SECONDS = 2
"""In which a launcher has seen the rank that ended first."""


class Process(NamedTuple):
    host: str
    pid: int
    begin: str
    """When it was started, by the clock of its kernel: no other one with this id has the same."""


def end_with_launcher() -> None:
    """For a rank of torch's launcher, ours too: the system kills it when that one dies. Linux alone can."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ.get(LAUNCHER, parent)):  # it has died already
        os.kill(os.getpid(), signal.SIGKILL)


def this_process() -> Process:
    return Process(socket.gethostname(), os.getpid(), _begin(os.getpid()))


def end_later(processes: list[Process]) -> None:
    """Kill those of this host that still run after a moment, when this process will have ended.

    A stopped process takes no SIGTERM, and launchers wait half a minute before they send more.
    """
    here = [one for one in processes if one.host == socket.gethostname() and one.begin and one.begin == _begin(one.pid)]
    if here:
        pids = " ".join(str(one.pid) for one in here)
        with suppress(OSError):
            subprocess.Popen(["/bin/sh", "-c", f"sleep {AFTER_SECONDS}; kill -9 {pids} 2>/dev/null"], start_new_session=True)


def _begin(pid: int) -> str:
    """Empty where there is no /proc, or no such process."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""
