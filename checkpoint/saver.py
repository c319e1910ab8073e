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
from typing import TYPE_CHECKING, Any, NamedTuple

from ..parallel.object_collectives import any_rank, distinct_from_all, from_all, from_first, rank_and_world
from ..parallel.progress import progress
from ..parallel.shard import LocalShard
from ..parallel.streams import Event, enter_thread, record_event, stream_waits
from .host_staging import HostStaging, device_of
from .manifest import json_facts
from .safetensors_file import file_order
from .save_plan import HeldShards, SavePlan, held_shards, make_save_plan
from .writer import TEMPORARY, SaveJob, Stopped, error_text, sibling, write_part

if TYPE_CHECKING:
    import torch

log = logging.getLogger("tokenyard")

FREE_SPACE = 1.1
"""Free space that a save must find, as a multiple of its own size."""
EXIT_SECONDS = 5.0
"""For which the end of a run, or of a failed save, waits for the thread."""


class Outcome(NamedTuple):
    """How a save ended; the same on every rank except for the seconds."""

    step: int
    path: Path
    error: str | None
    """None: the checkpoint is durable."""
    bytes: int
    blocked_seconds: float
    """For which the save blocked training on this rank."""
    seconds: float
    """From its start until this rank knew that it had ended."""

    def facts(self) -> dict[str, Any]:
        """Returns the fields that are not None as plain JSON, for events.jsonl."""
        return {key: str(value) if key == "path" else value for key, value in self._asdict().items() if value is not None}


@dataclass
class _Save:
    """A save that is under way."""

    job: SaveJob
    thread: Thread
    begin: float
    blocked: float = 0.0
    error: str | None = None


class Saver:
    """Saves of one run, one at a time, to `folder`. Methods are collective unless they say otherwise.

    after: called by rank 0's thread with the path of each new checkpoint, to tidy up; an error in it does not fail the save.
    staging_bytes: most host memory for the copies of an asynchronous save; None: as much as all of them take.
    """

    def __init__(
        self,
        folder: Path,
        limit_seconds: float = 1800.0,
        after: Callable[[Path], None] | None = None,
        staging_bytes: int | None = None,
    ) -> None:
        self.folder = folder
        self.limit_seconds = limit_seconds
        self.after = after
        self._held: HeldShards | None = None
        self._plan: SavePlan | None = None
        self._staging = HostStaging(staging_bytes)
        self._save: _Save | None = None

    def start(
        self,
        step: int,
        shards: dict[str, LocalShard],
        facts: dict[str, Any],
        attach: Callable[[Path], None] | None = None,
        asynchronous: bool = True,
        read: "Callable[[str], torch.Tensor] | None" = None,
    ) -> Outcome | None:
        """Starts a save; no other may be under way. The tensors may change after `wait_for_copies`, unless `asynchronous` is false.

        facts: plain JSON; rank 0's are kept. read: returns the values of a tensor when it is written: the tensors may be on the
        meta device then. Returns an Outcome only if the save could not start, as for lack of space.
        Raises ValueError, on every rank, for shards that do not make up their tensor or facts that are not JSON.
        """
        assert self._save is None
        begin = perf_counter()
        final = self.path_of(step)
        plan = self._plan_for(shards)
        temporary, facts, error = from_first(lambda: self._open(final, facts, plan.bytes))
        if error:
            return Outcome(step, final, error, plan.bytes, perf_counter() - begin, perf_counter() - begin)
        job = SaveJob(final, temporary, step, facts, *rank_and_world(), plan, self.limit_seconds, attach, read)
        mine = {name: shards[name] for name in plan.names}
        ready = record_event(device_of(mine))
        thread = Thread(target=self._write, args=[job, mine, ready, asynchronous], name="checkpoint", daemon=True)
        save = self._save = _Save(job, thread, begin)
        if asynchronous:
            self._staging.begin()
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left
            self._staging.end()
            self._save = None
            raise
        save.blocked = perf_counter() - begin
        return None

    def wait_for_copies(self, *_: object) -> None:
        """Returns when the tensors that are being saved may change. A hook of the optimizer, before its update. Not collective."""
        seconds = self._staging.wait()
        if self._save is not None:
            self._save.blocked += seconds

    def flags(self) -> tuple[bool, bool]:
        """(this rank has failed, this rank is writing). Not collective."""
        if self._save is None:
            return False, False
        writing = self._save.thread.is_alive()  # read first: a thread that has ended has set its error
        return self._error() is not None, writing

    def poll(self, failed: bool, writing: bool) -> Outcome | None:
        """Returns the outcome, if the save has ended: if it `failed` on any rank, or no rank is `writing`. Collective only then."""
        save = self._save
        if save is None or (writing and not failed):
            return None
        error = None
        if failed:
            mine = self._error()
            save.job.stop.set()
            save.thread.join(EXIT_SECONDS)
            # After this collective nobody writes any more, and the folder can be removed.
            error = next(f"rank {rank}: {text}" for rank, text in enumerate(from_all(mine)) if text is not None)
            if save.job.rank == 0:
                shutil.rmtree(save.job.temporary, ignore_errors=True)
        self._save = None
        job, seconds = save.job, perf_counter() - save.begin
        return Outcome(job.step, job.final, error, job.plan.bytes, save.blocked, seconds)

    def poll_all(self) -> Outcome | None:
        """Like `poll`, with an all-reduce of the `flags` of its own if a save is under way."""
        return self.poll(*any_rank(*self.flags())) if self._save else None

    def wait(self) -> Outcome | None:
        """Waits up to `limit_seconds` for the save under way; returns its outcome.

        Keeps the hang guard quiet while ranks answer.
        """
        while self._save is not None:
            self._save.thread.join(0.02)
            if (outcome := self.poll_all()) is not None:
                return outcome
            progress()
        return None

    def close(self) -> None:
        """Gives a save that is nearly done a moment, at the end of a run, however it ends. Not collective."""
        if self._save is not None:
            self._save.thread.join(EXIT_SECONDS)
            self._save.job.stop.set()

    def path_of(self, step: int) -> Path:
        """Returns where a checkpoint of this step is, or would be. Not collective."""
        return self.folder / f"step_{step:08d}"

    def space_error(self, shards: dict[str, LocalShard]) -> str | None:
        """Returns why there is no space for a save of `shards`, None if there is."""
        size = self._plan_for(shards).bytes
        return from_first(lambda: self._space_error(size))

    def space_error_for(self, size: int) -> str | None:
        """Like `space_error`, for a save of `size` bytes. Not collective."""
        with suppress(OSError):  # a folder that cannot be read: the next save reports it
            return self._space_error(size)

    def _space_error(self, size: int) -> str | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        text = f"it needs {size:,} bytes and a tenth more, and {self.folder} has {free:,} bytes free"
        return text if free < FREE_SPACE * size else None

    def _error(self) -> str | None:
        """Returns the error of the save under way on this rank."""
        save = self._save
        if save is None:
            return None
        if save.error is None and save.thread.is_alive() and perf_counter() - save.begin > self.limit_seconds:
            return f"TimeoutError: the save took longer than checkpoint.timeout_seconds={self.limit_seconds:g}"
        return save.error

    def _plan_for(self, shards: dict[str, LocalShard]) -> SavePlan:
        """Returns this rank's plan, made anew only if some rank holds other shards than in the last save."""
        rank, _ = rank_and_world()
        held, failure = None, None
        try:
            held = held_shards(shards, rank)
        except ValueError as error:
            failure = error
        changed, failed = any_rank(held != self._held or self._plan is None, failure is not None)
        if failed:
            raise next(error for error in from_all(failure) if error is not None)
        if changed:
            assert held is not None
            names, of_names = distinct_from_all(held.names)
            rectangles, of_rectangles = distinct_from_all(held.rectangles)
            self._plan = make_save_plan(names, rectangles, list(zip(of_names, of_rectangles, strict=True)), rank)
            self._held = held
        assert self._plan is not None
        return self._plan

    def _open(self, final: Path, facts: dict[str, Any], size: int) -> tuple[Path, dict[str, Any], str | None]:
        """Makes the temporary folder, on rank 0. Returns it, the facts as they will be read, and the error if that failed."""
        facts = json_facts(facts)
        temporary = sibling(final, TEMPORARY)
        try:
            error = self._space_error(size)
            if error is None:
                temporary.mkdir()
        except OSError as caught:
            error = error_text(caught)
        return temporary, facts, error

    def _write(self, job: SaveJob, shards: dict[str, LocalShard], ready: Event, copy: bool) -> None:
        """Runs in the thread. The tensors have their values once the device's event `ready` is done."""
        try:
            staged = None
            if copy and self._staging.fits(shards):
                shards = self._staging.copy(shards, ready)
            elif copy:
                ordered = {name: shards[name] for name in file_order({name: tensor for name, (_, tensor) in shards.items()})}
                shards.clear()  # what was made for the save alone is freed after its copy
                staged = self._staging.copy_in_turns(ordered, ready)
                shards = {name: shard._replace(tensor=shard.tensor.to("meta")) for name, shard in ordered.items()}
            else:
                enter_thread(device_of(shards))
                stream_waits(ready)
            write_part(job, shards, staged)
        except Stopped:
            return
        except BaseException as error:  # nobody joins the thread for its exception: the next `flags` report it
            if self._save is not None and self._save.job is job:
                self._save.error = error_text(error)
            return
        finally:
            self._staging.end()  # also if it failed before the copy
        if job.rank == 0 and self.after is not None:
            try:
                self.after(job.final)
            except Exception as error:
                log.warning("checkpoint %s is durable, but tidying up failed: %s", job.final, error_text(error))
