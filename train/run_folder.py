"""A run folder belongs to one job, by a lock, and holds one timeline of checkpoints and records."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import weakref
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..checkpoint.folder import checkpoints_in, step_of
from ..checkpoint.fsync import sync_folder
from .config.config import ConfigError
from .config.environment import job_restarted, launch_id
from .config.own_files import refuse_links, write_whole

# Rank 0 locks `run.dir/lock`; the operating system releases the lock with the process.

NAME = "lock"
PROCESS = secrets.token_hex(8)
"""Distinguishes this process from another one with its id, in another container or earlier."""


class RunLock:
    """Held until `release`, or until this object is garbage-collected."""

    def __init__(self, path: Path, descriptor: int | None, previous: str | None = None) -> None:
        self.previous = previous
        """The owner that never released it, in words."""
        self._release = weakref.finalize(self, _release, path, descriptor) if descriptor is not None else None

    def release(self) -> None:
        if self._release is not None:
            self._release()


def lock_run(folder: Path) -> RunLock:
    """Locks a run folder, also if a dead process has left its lock. Raises ConfigError, naming the owner, if it is in use."""
    refuse_links(folder)
    path = folder / NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _owner(descriptor)
        os.close(descriptor)
        if (owner.get("pid"), owner.get("process")) == (os.getpid(), PROCESS):
            return RunLock(path, None)  # an earlier run of this process, which is over
        living = f"{_words(owner)}{_heirs(path, owner)}"
        raise ConfigError.of("run.dir", str(folder), f"is in use by {living}", "another run.dir, or end that job") from None
    except OSError:  # a file system without locks: there is only the content of the file
        pass
    if not _is_at(descriptor, path):  # its owner removed it between our two calls
        os.close(descriptor)
        return lock_run(folder)
    owner = _owner(descriptor)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "start": now, "process": PROCESS}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(mine).encode(), 0)
    return RunLock(path, descriptor, _words(owner) if owner else None)


def _release(path: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
    os.close(descriptor)


def _owner(descriptor: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _words(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('start', '?')}"


def _heirs(path: Path, owner: dict[str, Any]) -> str:
    """Returns the processes that keep the lock of an owner that has ended on this host, in words."""
    if owner.get("host") != socket.gethostname() or Path(f"/proc/{owner.get('pid')}").exists():
        return ""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if link.samefile(path):
                found.add(link.parts[2])
    return f", which has ended; its lock is held by process {', '.join(sorted(found))}" if found else ""


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


# If a run resumes from an earlier point, the later checkpoints of the folder are moved out of the way, never mixed in.
#
# `RUN/begun.json` says what checkpoint.resume was and which launch started the run: ranks that the same launch restarts resume from
# the checkpoints that they wrote themselves. No torch here.

BEGUN = "begun.json"


def goes_on(setting: str, folder: Path) -> bool:
    """Whether this is a restart by the launch that has started the run with `setting` (checkpoint.resume)."""
    return job_restarted() and _begun(folder) == _mark(setting)


def keep_begin(setting: str, folder: Path) -> None:
    """Records that the checkpoints of `folder` are those of a run started with `setting`."""
    if _begun(folder) != _mark(setting):
        write_whole(folder / BEGUN, json.dumps(_mark(setting)))


def set_aside(folder: Path, found: Path) -> Path | None:
    """Moves the checkpoints that are not part of a run resumed from `found` into a folder with the date.

    They are the ones later than `found`, or all of them if `found` is in another folder. Returns that folder, or None.
    """
    checkpoints = folder / "checkpoints"
    own = found.resolve().parent == checkpoints.resolve()
    others = [path for path in checkpoints_in(checkpoints) if not own or step_of(path) > step_of(found)]
    if not others:
        return None
    aside = _new_folder(checkpoints)
    for path in others:
        path.rename(aside / path.name)
    sync_folder(checkpoints)
    return aside


def _new_folder(checkpoints: Path) -> Path:
    stem = datetime.now().strftime("set_aside_%Y-%m-%dT%H-%M-%S")
    for name in (stem if attempt == 1 else f"{stem}-{attempt}" for attempt in range(1, 10_000)):
        with suppress(FileExistsError):
            (checkpoints / name).mkdir()
            return checkpoints / name
    raise FileExistsError(checkpoints / stem)


def _mark(setting: str) -> list[str]:
    path = setting if setting in ("auto", "never") else os.path.realpath(setting)
    return [path, launch_id()]


def _begun(folder: Path) -> list[str] | None:
    with suppress(OSError, ValueError):
        return json.loads((folder / BEGUN).read_text())
    return None
