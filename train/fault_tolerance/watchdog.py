"""The hang guard: a collective that does not complete in time ends the job, after all ranks have reported where they are.

A thread of each rank observes the progress of the training thread. If that has waited too long, it writes down where it is and
raises an alarm, upon which all ranks do so, hung or not: a rank that does not is frozen or gone. One of them then names the rank
that the others wait for (notices.py has the files). The same thread ends the process if another rank has left a note that it failed
alone. It never reads the clock on the wall: those of hosts differ, and they are set back.
"""

import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread, main_thread
from typing import Any

from ...data.errors import DataStop
from ...parallel.object_collectives import from_all, from_first
from ...parallel.progress import PROGRESS, name_layers
from ..checkpointing import SaveFailed
from ..config.complain import say
from ..exit import STACKS, ExitCode, Failure, RunStop, in_one_line, leave_note, report_failure
from ..logging.journal import Journal
from ..session import Session
from .hang_diagnosis import HangDiagnosis, Position
from .notices import Notices, Settled
from .processes import Process, end_later, this_process

GRACE_SECONDS = 3.0
"""How long the training thread has to leave by itself when another rank has failed."""


class Watchdog:
    """Watches the training thread from `start` to `close`."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        timeout_seconds: float,
        on_end: Callable[[HangDiagnosis], None] = lambda _: os._exit(int(ExitCode.hang)),
        on_hang: Callable[[str], None] = lambda _: None,
        on_failure: Callable[[int], None] = lambda _: None,
        start_id: str = "",
    ) -> None:
        """`on_end` is called on every rank after the report; by default it ends the process, whose main thread cannot end.

        `on_hang` is called before that, with the diagnosis, on each rank that has it; `on_failure` with the exit code where another
        rank has failed. `start_id` is the same on all ranks and differs from that of any other start of the run.
        """
        self.folder, self.rank, self.world, self.timeout = folder, rank, world, timeout_seconds
        self.tick = min(2.0, timeout_seconds / 20)
        self.on_end, self.on_hang, self.on_failure = on_end, on_hang, on_failure
        self.notices = Notices(folder, rank, world, self.tick, start_id)
        self.place = 0
        """In the pipeline."""
        self.processes: dict[int, Process] = {}
        """The processes of the ranks, where they are known."""
        self.closed = Event()
        self.thread = Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> "Watchdog":
        self.thread.start()
        return self

    def close(self) -> None:
        self.closed.set()
        self.thread.join()

    def _watch(self) -> None:
        with closing(self.notices):
            while not self.closed.wait(self.tick / 4):
                alarm = self.notices.look()
                if alarm is not None and alarm.code != ExitCode.hang:
                    self._end_after_failure(alarm)
                    return
                overdue = time.monotonic() - PROGRESS.since > self.timeout
                if alarm is not None or (overdue and current_collective() is not None):
                    self._report()
                    return

    def _end_after_failure(self, failure: Failure) -> None:
        """Ends the process, unless the training thread notices the failure by itself, as with gloo."""
        if self.closed.wait(GRACE_SECONDS):
            return
        if self.rank == 0 and failure.code == ExitCode.error:
            self._event("failed", step=failure.step, error=failure.text)
        with suppress(Exception):  # the process ends, whatever a tracker does
            self.on_failure(failure.code)
        self.notices.close()
        os._exit(failure.code)

    def _report(self) -> None:
        """Writes a note and, on one rank, the diagnosis. Whatever fails here, the process ends."""
        seconds = round(time.monotonic() - PROGRESS.since, 3)
        where = (PROGRESS.step, PROGRESS.phase, PROGRESS.layer, current_collective(), PROGRESS.number)
        of_pipeline = (self.place, PROGRESS.neighbour, PROGRESS.passes, PROGRESS.in_schedule)
        mine = Position(self.rank, *where, seconds, self.notices.start, *of_pipeline)
        diagnosis = HangDiagnosis([], f"hang: rank {self.rank} waits: {mine}")
        try:
            self._write_note(mine)
            settled = self._settle(mine)
            diagnosis = settled.diagnosis or diagnosis
            if settled.collected:
                self._print(diagnosis)
            else:
                time.sleep(0.5)  # launchers end all ranks with the first, which should be the one that reports
            with suppress(Exception):  # the job ends, whatever a tracker does
                self.on_hang(diagnosis.text)
            if diagnosis.silent:
                end_later([process for rank, process in self.processes.items() if rank in diagnosis.ranks])
        except Exception as error:
            say(f"{diagnosis.text}; {in_one_line(error)}")
        finally:
            self.notices.close()
            self.on_end(diagnosis)

    def _settle(self, mine: Position) -> Settled:
        settling = self.notices.settle(mine)
        while True:
            try:
                time.sleep(next(settling))
            except StopIteration as stop:
                return stop.value

    def _write_note(self, mine: Position) -> None:
        error = self.notices.put(mine)
        if error is not None:
            stacks = self.folder / STACKS
            lacking = f"{stacks} cannot be written ({in_one_line(error)}), see {self.notices.folders[0] / STACKS}"
            say(f"hang: rank {self.rank} is at {mine}; {lacking}")

    def _print(self, diagnosis: HangDiagnosis) -> None:
        say(f"{diagnosis.text}; stacks of all ranks: {self.folder / STACKS}")
        self._event("hang", **diagnosis._asdict())

    def _event(self, kind: str, **facts: Any) -> None:
        with suppress(Exception), closing(Journal.appending(self.folder / "events.jsonl")) as journal:
            journal.event(kind, **facts)


@contextmanager
def hang_guard(session: Session, on_hang: Callable[[str], None], on_failure: Callable[[int], None]) -> Iterator[None]:
    """Runs the watchdog of this rank, if there are other ranks. `on_hang`, `on_failure`: see Watchdog."""
    mesh = session.parallel.mesh
    if mesh.world == 1:
        yield
        return
    model = session.parallel.model
    name_layers(zip(model.block_indices, model.blocks, strict=True))
    start_id, timeout = from_first(lambda: secrets.token_hex(8)), session.config.parallel.timeout_seconds
    watchdog = Watchdog(session.folder, mesh.rank, mesh.world, timeout, on_hang=on_hang, on_failure=on_failure, start_id=start_id)
    watchdog.place = 0 if session.parallel.pipeline is None else session.parallel.pipeline.rank
    watchdog.processes = dict(enumerate(from_all(this_process())))
    watchdog.start()
    try:
        yield
    except (DataStop, RunStop, SaveFailed):  # raised on every rank
        raise
    except Exception as error:
        report_failure(error)
        leave_note(session.folder, Failure(mesh.rank, session.step, in_one_line(error), int(ExitCode.error)))
        raise
    finally:
        watchdog.close()


def current_collective() -> str | None:
    """Returns the collective that the training thread is in: ours, or one of torch (FSDP's, for example), found on its stack."""
    if PROGRESS.collective is not None:
        return PROGRESS.collective
    frame = sys._current_frames().get(main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_filename.endswith("distributed_c10d.py"):
            return f"{frame.f_code.co_name} of torch"
        frame = frame.f_back
    return None
