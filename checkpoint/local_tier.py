"""Fast saves to a folder of the host, in memory or on a local disk, each with a copy on the next host.

Every rank writes all that it holds, by itself, and then passes its file on to the next host (hosts.py) and takes that of the host
before. Nothing is planned and nothing is written to a shared folder; what a rank does does not depend on the number of ranks. One
save is whole at any time after the first: an older one is removed only when all ranks have ended the next.
"""

import logging
import shutil
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any, NamedTuple

from ..parallel.failpoints import failpoint
from ..parallel.object_collectives import any_rank, from_all
from ..parallel.progress import progress
from ..parallel.shard import LocalShard
from ..parallel.streams import Event, record_event
from .host_staging import HostStaging, device_of
from .hosts import Hosts, Ring
from .local_files import rank_files, remove_steps, write_rank
from .writer import error_text

log = logging.getLogger("tokenyard")

FREE_SPACE = 2.2
"""Free space that a save must find on each host, as a multiple of what its ranks hold: it has the copy of another host too."""


class LocalOutcome(NamedTuple):
    """How a save ended; the same on every rank except for bytes and seconds."""

    step: int
    error: str | None
    """None: all parts and all copies are there."""
    bytes: int
    """Written by this rank of its own."""
    blocked_seconds: float
    """For which the save blocked training on this rank."""
    seconds: float
    """From its begin until this rank and its neighbour had their files."""


class LocalTier:
    """Saves of one run to this host's `folder`, one at a time. Methods are collective unless they say otherwise."""

    def __init__(self, folder: Path, hosts: Hosts, limit_seconds: float) -> None:
        self.folder, self.hosts = folder, hosts
        self._ring = None if hosts.alone else Ring(hosts, limit_seconds)
        self._staging = HostStaging()
        self._thread: Thread | None = None
        self._error: str | None = None
        self._step = self._bytes = 0
        self._begin = self._ended = self._blocked = 0.0

    def start(self, step: int, shards: dict[str, LocalShard], facts: dict[str, Any]) -> None:
        """Starts a save, after `finish`. The tensors may change after `wait_for_copies`. facts: plain JSON; rank 0's are kept."""
        assert self._thread is None
        self._begin, self._step, self._error, self._bytes = perf_counter(), step, None, 0
        ready = record_event(device_of(shards))
        self._staging.begin()
        arguments = step, dict(shards), facts if self.hosts.rank == 0 else None, ready
        self._thread = Thread(target=self._write, args=arguments, name="local checkpoint", daemon=True)
        self._thread.start()
        self._blocked = perf_counter() - self._begin

    def finish(self) -> LocalOutcome | None:
        """Waits for the save under way, and removes those before it if it is whole. Returns its outcome, None without one."""
        if self._thread is None:
            return None
        begin = perf_counter()
        while self._thread.is_alive():
            self._thread.join(0.02)
            progress()
        self._thread = None
        error = self._error
        if any_rank(error is not None)[0]:
            error = next(f"rank {rank}: {text}" for rank, text in enumerate(from_all(error)) if text is not None)
        elif self.hosts.first:
            remove_steps(self.folder, below=self._step)
        waited = perf_counter() - begin
        return LocalOutcome(self._step, error, self._bytes, self._blocked + waited, self._ended - self._begin)

    def wait_for_copies(self, *_: object) -> None:
        """Returns when the tensors that are being saved may change. A hook of the optimizer, before its update. Not collective."""
        self._blocked += self._staging.wait()

    def clear(self, but: int | None = None) -> None:
        """Removes all saves of this run but that of the step `but`, on all hosts."""
        self.finish()
        if self.hosts.first:
            remove_steps(self.folder, but=but)
        any_rank(False)  # no rank saves anew before that

    def remove(self) -> None:
        """Removes the folders of this run from all hosts: a durable checkpoint has made them useless."""
        self.finish()
        any_rank(False)
        if self.hosts.first:
            shutil.rmtree(self.folder, ignore_errors=True)
            if not any(self.folder.parent.glob("*")):
                shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _write(self, step: int, shards: dict[str, LocalShard], facts: dict[str, Any] | None, ready: Event) -> None:
        """Runs in the thread. A rank that cannot write passes on nothing, so that its neighbours do not wait for it."""
        mine = rank_files(self.folder, step, self.hosts.rank, len(self.hosts.names))
        try:
            try:
                copies = self._staging.copy(shards, ready)
            finally:
                self._staging.end()
            self._check_space(sum(tensor.nbytes for _, tensor in copies.values()))
            failpoint("local.begun", step)
            self._bytes = write_rank(mine, copies, facts)
            failpoint("local.written", step)
        except Exception as error:
            self._error, mine = error_text(error), []
        try:
            if self._ring is not None:
                self._copy(step, mine, self._ring)
        except Exception as error:
            self._error = self._error or error_text(error)
        self._ended = perf_counter()

    def _copy(self, step: int, mine: list[Path], ring: Ring) -> None:
        path, note = rank_files(self.folder, step, ring.before, len(self.hosts.names))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = note.with_name(note.name + ".part")
        for old in (note, unfinished, path):
            old.unlink(missing_ok=True)
        if ring.swap(mine, [path, unfinished]):
            failpoint("local.copied", step)
            unfinished.rename(note)

    def _check_space(self, size: int) -> None:
        """Raises OSError if the host has no space. `size`: bytes that this rank holds."""
        needed, free = size * self.hosts.names.count(self.hosts.name), shutil.disk_usage(self.folder).free
        if free < FREE_SPACE * needed:
            raise OSError(
                f"the ranks of this host hold {needed:,} bytes, and {self.folder} has {free:,} free: it needs {FREE_SPACE:g} times"
            )
