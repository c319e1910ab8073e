"""A run folder: the lock that gives it to one job, and the one timeline of checkpoints and records that it holds."""

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
from .config.private_files import refuse_links, write_private

# One run folder, one job: rank 0 holds a lock on `run.dir/lock`, which the operating system ends with the process.

NAME = "lock"
PROCESS = secrets.token_hex(8)
"""Tells this process from another one with its id: in another container, or before."""


class RunLock:
    """Held until `release`, or until nobody has this object any more."""

    def __init__(self, path: Path, descriptor: int | None, previous: str | None = None) -> None:
        self.previous = previous
        """In words, the owner that never gave it back."""
        self._release = weakref.finalize(self, _release, path, descriptor) if descriptor is not None else None

    def release(self) -> None:
        if self._release is not None:
            self._release()


def lock_run(folder: Path) -> RunLock:
    """ConfigError, naming host and process id, if another process has the lock. What a dead one has left is taken over."""
    refuse_links(folder)
    path = folder / NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _owner(descriptor)
        os.close(descriptor)
        if (owner.get("pid"), owner.get("process")) == (os.getpid(), PROCESS):
            return RunLock(path, None)  # an earlier run of this process, which is over
        living = f"{_words(owner)}{_heirs(path, owner)}"
        raise ConfigError.of("run.dir", str(folder), f"is in use by {living}", "another run.dir, or end that job") from None
    except OSError:  # a file system without locks: what the file says is all there is
        pass
    if not _is_at(descriptor, path):  # its owner removed it between our two calls
        os.close(descriptor)
        return lock_run(folder)
    owner = _owner(descriptor)
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "start": _now(), "process": PROCESS}
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
    """If the owner has ended on this host: the processes that it started and that keep its lock, in words."""
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# A run folder holds one timeline: what a run that goes on from an earlier point leaves behind is set aside, never mixed in.
#
# `RUN/begun.json` says from where the run was told to begin and which launch did so: ranks that the same launch starts again go
# on from what they wrote themselves. No torch here.

BEGUN = "begun.json"


def goes_on(wish: str, folder: Path) -> bool:
    """Whether this start of the ranks repeats one of the same launch, which has begun as `wish` (checkpoint.resume) says."""
    return job_restarted() and _begun(folder) == _mark(wish)


def keep_begin(wish: str, folder: Path) -> None:
    """The checkpoints of `folder` are from now on of a run that has begun as `wish` says."""
    if _begun(folder) != _mark(wish):
        write_private(folder / BEGUN, json.dumps(_mark(wish)))


def set_aside(folder: Path, found: Path) -> Path | None:
    """Move the checkpoints that a run in `folder`, which goes on from `found`, has not come from into a folder with the date.

    Those are all later than `found`; and all there are if `found` is of another folder. None if there are none.
    """
    checkpoints = folder / "checkpoints"
    own = found.resolve().parent == checkpoints.resolve()
    strange = [path for path in checkpoints_in(checkpoints) if not own or step_of(path) > step_of(found)]
    if not strange:
        return None
    aside = _new_folder(checkpoints)
    for path in strange:
        path.rename(aside / path.name)
    sync_folder(checkpoints)
    return aside


def _new_folder(checkpoints: Path) -> Path:
    stem = datetime.now().strftime("set_aside_%Y-%m-%dT%H-%M-%S")
    for name in (stem if attempt == 1 else f"{stem}-{attempt}" for attempt in range(1, 10_000)):
        with suppress(FileExistsError):
            (checkpoints / name).mkdir(mode=0o700)
            return checkpoints / name
    raise FileExistsError(checkpoints / stem)


def _mark(wish: str) -> list[str]:
    path = wish if wish in ("auto", "never") else os.path.realpath(wish)
    return [path, launch_id()]


def _begun(folder: Path) -> list[str] | None:
    with suppress(OSError, ValueError):
        return json.loads((folder / BEGUN).read_text())
    return None
