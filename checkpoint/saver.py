"""Saves while training goes on. What the ranks agree on travels with collectives that training has anyway; writing needs none.

`start`: the ranks agree on who writes what; a thread copies this rank's shards to host memory and then writes them.
`wait_for_copies`: before the next update of the weights, the only thing that training waits for.
`flags`, `poll`: whether this rank failed or is still writing travels with the flags of each step (train/step_flags.py); once they
say that any rank has failed or that none is writing, `poll` ends the save. `poll_all` reduces the flags itself.
`wait`: until the save has ended.
"""

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any, NamedTuple

from ..parallel.object_collectives import any_rank, from_all, from_first, rank_and_world, through_first
from ..parallel.progress import progress
from ..parallel.shard import LocalShard
from ..parallel.streams import Event, record
from .host_copies import Copies, device_of, in_place
from .manifest import checked_facts
from .save_plan import Offer, Share, offers_of, shares_of
from .writer import TEMPORARY, Job, Stopped, beside, describe, discard, write_share

log = logging.getLogger("tokenyard")

ROOM = 1.1
"""Free space that a save must find, as a multiple of its own size."""
PATIENCE_AT_EXIT = 5.0


class Outcome(NamedTuple):
    """How a save ended; the same on every rank but for the seconds."""

    step: int
    path: Path
    error: str | None
    """None: the checkpoint is durable."""
    bytes: int
    blocked_seconds: float
    """Of training, on this rank."""
    seconds: float
    """From its begin until it was known to have ended, on this rank."""

    def facts(self) -> dict[str, Any]:
        """For events.jsonl."""
        return {key: str(value) if key == "path" else value for key, value in self._asdict().items() if value is not None}


@dataclass
class _Save:
    """One that is under way."""

    job: Job
    thread: Thread
    begin: float
    blocked: float = 0.0
    error: str | None = None


class Saver:
    """Saves of one run, one at a time, to `folder`. All methods are collective but for those that say so.

    after: called by rank 0's writer with the new checkpoint's path, to tidy up; what it raises does not matter to the save.
    """

    def __init__(self, folder: Path, limit_seconds: float = 1800.0, after: Callable[[Path], None] | None = None) -> None:
        self.folder = folder
        self.limit_seconds = limit_seconds
        self.after = after
        self._offers: list[Offer] | None = None
        self._share: Share | None = None
        self._copies = Copies()
        self._save: _Save | None = None

    def start(
        self,
        step: int,
        held: dict[str, LocalShard],
        facts: dict[str, Any],
        attach: Callable[[Path], None] | None = None,
        asynchronous: bool = True,
    ) -> Outcome | None:
        """Start a save; `held` may change after `release`, unless `asynchronous` is false. No other may be under way.

        facts: plain JSON; rank 0's are kept. An Outcome if it could not start, for want of space. ValueError, on every rank, for
        pieces that do not make up their tensor or facts that are no JSON.
        """
        assert self._save is None
        begin = perf_counter()
        final = self.path_of(step)
        share = self._plan(held)
        temporary, facts, refused = from_first(lambda: self._open(final, facts, share.bytes))
        if refused:
            return Outcome(step, final, refused, share.bytes, perf_counter() - begin, perf_counter() - begin)
        job = Job(final, temporary, step, facts, *rank_and_world(), share, self.limit_seconds, attach)
        mine = {name: held[name] for name in share.names}
        ready = record(device_of(mine))
        thread = Thread(target=self._write, args=[job, mine, ready, asynchronous], name="checkpoint", daemon=True)
        save = self._save = _Save(job, thread, begin)
        if asynchronous:
            self._copies.open()
        try:
            thread.start()
        except RuntimeError:  # the system has none
            self._copies.close()
            self._save = None
            raise
        save.blocked = perf_counter() - begin
        return None

    def space_error(self, held: dict[str, LocalShard]) -> str | None:
        """Why there is no room for a save of `held`, None if there is."""
        size = self._plan(held).bytes
        return from_first(lambda: self._space_error(size))

    def wait_for_copies(self) -> None:
        """Return when what is being saved may change; the optimizer calls it before its update. Not collective."""
        seconds = self._copies.wait()
        if self._save is not None:
            self._save.blocked += seconds

    def path_of(self, step: int) -> Path:
        """Where a checkpoint of this step is, or would be."""
        return self.folder / f"step_{step:08d}"

    def poll_all(self) -> Outcome | None:
        """Like `poll`, with this call's own all-reduce of the `flags`, if a save is under way."""
        return self.poll(*any_rank(*self.flags())) if self._save else None

    def flags(self) -> tuple[bool, bool]:
        """(this rank has failed, this rank is writing). Not collective."""
        if self._save is None:
            return False, False
        writing = self._save.thread.is_alive()  # asked first: a thread that has ended has said how
        return self.error() is not None, writing

    def error(self) -> str | None:
        """What went wrong on this rank with the save under way. Not collective, and known at once."""
        save = self._save
        if save is None:
            return None
        if save.error is None and save.thread.is_alive() and perf_counter() - save.begin > self.limit_seconds:
            return f"TimeoutError: the save took longer than checkpoint.timeout_seconds={self.limit_seconds:g}"
        return save.error

    def poll(self, failed: bool, writing: bool) -> Outcome | None:
        """The outcome, if the save has ended: if it `failed` on any rank, or no rank is `writing`. Collective only then."""
        if self._save is None or (writing and not failed):
            return None
        return self._end(failed)

    def wait(self) -> Outcome | None:
        """Wait for the save under way, up to `limit_seconds`; how it ended. The hang guard sees that all ranks still answer."""
        while self._save is not None:
            self._save.thread.join(0.02)
            if (outcome := self.poll_all()) is not None:
                return outcome
            progress()
        return None

    def close(self) -> None:
        """At the end, whatever ended the run: a moment for what is nearly done. Not collective."""
        if self._save is not None:
            self._save.thread.join(PATIENCE_AT_EXIT)
            self._save.job.stop.set()

    def _plan(self, held: dict[str, LocalShard]) -> Share:
        """This rank's share, made anew only if some rank holds other pieces than the last time."""
        offers, failure = None, None
        try:
            offers = offers_of(held)
        except ValueError as error:
            failure = error
        changed, failed = any_rank(offers != self._offers or self._share is None, failure is not None)
        if failed:
            raise next(error for error in from_all(failure) if error is not None)
        if changed:
            self._share = through_first(offers, shares_of)
            self._offers = offers
        assert self._share is not None
        return self._share

    def space_error_for(self, size: int) -> str | None:
        """The same for so many bytes. Not collective."""
        with suppress(OSError):  # a folder that cannot be asked: the save will say so
            return self._space_error(size)

    def _space_error(self, size: int) -> str | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        return (
            f"it needs {size:,} bytes and a tenth more, and {self.folder} has {free:,} bytes free" if free < ROOM * size else None
        )

    def _open(self, final: Path, facts: dict[str, Any], size: int) -> tuple[Path, dict[str, Any], str | None]:
        """For rank 0: the temporary folder, the facts as they will be read, and why not."""
        facts = checked_facts(facts)
        temporary = beside(final, TEMPORARY)
        try:
            if error := self._space_error(size):
                return temporary, {}, error
            temporary.mkdir()
        except OSError as error:
            return temporary, {}, describe(error)
        return temporary, facts, None

    def _write(self, job: Job, held: dict[str, LocalShard], ready: Event, copy: bool) -> None:
        """In the thread. `held` is what the device has computed when `ready` is done."""
        try:
            write_share(job, self._copies.take(held, ready) if copy else in_place(held, ready))
        except Stopped:
            return
        except BaseException as error:  # a thread has nobody to tell but the next `flags`
            self._failed(job, describe(error))
            return
        finally:
            self._copies.close()  # also if it did not come to them
        if job.rank == 0 and self.after is not None:
            try:
                self.after(job.final)
            except Exception as error:
                log.warning("checkpoint %s is durable, but tidying up failed: %s", job.final, describe(error))

    def _failed(self, job: Job, error: str) -> None:
        if self._save is not None and self._save.job is job:
            self._save.error = error

    def _end(self, failed: bool) -> Outcome:
        """Collective. After a failure nobody writes any more when the folder is removed."""
        save, error = self._save, None
        assert save is not None
        if failed:
            mine = self.error()
            save.job.stop.set()
            save.thread.join(PATIENCE_AT_EXIT)
            texts = from_all(mine)
            error = next(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None)
            if save.job.rank == 0:
                discard(save.job.temporary)
        self._save = None
        job, seconds = save.job, perf_counter() - save.begin
        return Outcome(job.step, job.final, error, job.share.bytes, save.blocked, seconds)
