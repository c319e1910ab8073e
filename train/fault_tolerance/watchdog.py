"""The hang guard: a collective that does not complete in time ends the job, after all ranks have reported where they are.

A thread of each rank observes the progress of the training thread. If that has waited too long, it writes down where it is, and so
do all ranks that see such a note in RUN/stacks, hung or not: a rank without a note is frozen or gone. The first of them then names
the rank that the others wait for. If RUN/stacks cannot be written, the notes go to the host's folder for temporary files. The same
thread ends the process if another rank has left a note that it failed alone. It never reads the clock on the wall: those of hosts
differ, and they are set back.
"""

import faulthandler
import json
import os
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread, main_thread
from typing import Any, NamedTuple

from ...data.errors import DataStop
from ...parallel.object_collectives import from_all, from_first
from ...parallel.progress import PROGRESS, name_layers
from ..checkpointing import SaveFailed
from ..config.complain import say
from ..exit import STACKS, ExitCode, Failure, RunStop, find_note, in_one_line, leave_note, report_failure
from ..logging.journal import Journal
from ..session import Session
from .processes import Process, end_later, this_process

GRACE_SECONDS = 3.0
"""How long the training thread has to leave by itself when another rank has failed."""


class Position(NamedTuple):
    """Where the training thread of a rank is: the content of its note."""

    rank: int
    step: int
    phase: str
    layer: int | None
    collective: str | None
    """None: it does not wait for others."""
    number: int
    """Collectives begun."""
    seconds: float
    """How long it has been there."""
    start: str
    """Identifies the start of the run."""
    place: int = 0
    """Of its stages in the pipeline. Ranks of one place begin the same collectives and passes."""
    neighbour: int | None = None
    """The rank of another place whose message it waits for."""
    passes: int = 0
    """Passes through stages begun."""
    in_schedule: bool = False
    """Whether it runs the schedule of the pipeline."""

    def __str__(self) -> str:
        layer = "" if self.layer is None else f", layer {self.layer}"
        within = f", {self.collective}" if self.collective else ", in no collective"
        return f"step {self.step}, {self.phase}{layer}{within}, for {self.seconds:.1f} s"


class HangDiagnosis(NamedTuple):
    ranks: list[int]
    """Those that the others wait for."""
    text: str
    step: int | None = None
    phase: str | None = None
    layer: int | None = None
    collective: str | None = None
    """Where the others wait."""


def diagnose(positions: dict[int, Position], world: int) -> HangDiagnosis:
    """Names the ranks that the others wait for, by the first of these that any rank is: silent, busy, behind, elsewhere.

    Stages of a pipeline rightly have begun different numbers of collectives: these are compared between ranks of one place.
    """
    ranks, why = _culprits(positions, world)
    waiting = [position for position in positions.values() if position.rank not in ranks] or list(positions.values())
    others = max(waiting, key=lambda position: position.seconds)
    where = [f"rank {rank} ({positions.get(rank, 'no answer')})" for rank in ranks]
    text = f"hang: {', '.join(where)} {why}; the others wait: {others}"
    return HangDiagnosis(ranks, text, others.step, others.phase, others.layer, others.collective)


def _culprits(positions: dict[int, Position], world: int) -> tuple[list[int], str]:
    silent = [rank for rank in range(world) if rank not in positions]
    if silent:
        return silent, "is frozen, or its host is gone"
    busy = [rank for rank, position in positions.items() if position.collective is None]
    if busy:
        return busy, "has not reached this collective"
    peers = {rank: [other for other in positions.values() if other.place == at.place] for rank, at in positions.items()}
    behind = {rank for rank, at in positions.items() if any(at.number < other.number for other in peers[rank])}
    skipped = [rank for rank in behind if all(positions[rank].passes > other.passes for other in peers[rank] if other.rank != rank)]
    if skipped:
        return skipped, "skipped a collective"
    free = {rank: at for rank, at in positions.items() if not _blockers(at, peers[rank], positions)}
    if not free:
        return sorted(positions), "wait for each other's messages"
    if behind & set(free):
        return sorted(behind & set(free)), "is behind"
    return _elsewhere(free), "skipped a collective or entered a different one"


def _blockers(position: Position, peers: list[Position], positions: dict[int, Position]) -> list[int]:
    """Returns the ranks that this one waits for, given that all wait. `peers`: the ranks of its place.

    For a message that is its sender. In a collective it is the peers that have begun fewer; outside of the schedule, where stages
    meet, also all ranks that are still in it.
    """
    if position.neighbour is not None:
        return [position.neighbour]
    late = [other.rank for other in peers if other.number < position.number]
    return late or [other.rank for other in positions.values() if other.in_schedule and not position.in_schedule]


def _elsewhere(positions: dict[int, Position]) -> list[int]:
    """Returns the ranks at another place than most, given that all have begun equally many; of equal halves, the further one."""
    places = {rank: (at.step, at.phase, at.layer, at.collective) for rank, at in positions.items()}
    counts = Counter(places.values())
    if len(counts) == 1:
        return sorted(positions)
    furthest = {place: max(positions[rank].step for rank in positions if places[rank] == place) for place in counts}
    rarest = min(counts, key=lambda place: (counts[place], -furthest[place]))
    return [rank for rank in positions if places[rank] == rarest]


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

        `on_hang` is called before that, with the diagnosis, on the rank that reports; `on_failure` with the exit code where another
        rank has failed. `start_id` is the same on all ranks and differs from that of any other start of the run.
        """
        self.folder, self.rank, self.world, self.timeout = folder, rank, world, timeout_seconds
        self.tick = min(2.0, timeout_seconds / 20)
        self.on_end, self.on_hang, self.on_failure = on_end, on_hang, on_failure
        self.start_id = start_id
        self.folders = [folder / STACKS, Path(tempfile.gettempdir()) / f"tokenyard-{start_id or os.getpid()}"]
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
        while not self.closed.wait(self.tick):
            if (failure := find_note(self.folder)) is not None:
                self._end_after_failure(failure)
                return
            overdue = time.monotonic() - PROGRESS.since > self.timeout
            if (overdue and current_collective() is not None) or self._notes():
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
        os._exit(failure.code)

    def _report(self) -> None:
        """Writes the note and, on the first rank, the diagnosis. Whatever fails here, the process ends."""
        seconds = round(time.monotonic() - PROGRESS.since, 3)
        where = (PROGRESS.step, PROGRESS.phase, PROGRESS.layer, current_collective(), PROGRESS.number)
        of_pipeline = (self.place, PROGRESS.neighbour, PROGRESS.passes, PROGRESS.in_schedule)
        mine = Position(self.rank, *where, seconds, self.start_id, *of_pipeline)
        diagnosis = HangDiagnosis([], f"hang: rank {self.rank} waits: {mine}")
        try:
            self._write_note(mine)
            deadline = time.monotonic() + 2 * self.tick + 1
            while len(notes := self._notes() | {self.rank: mine}) < self.world and time.monotonic() < deadline:
                time.sleep(self.tick / 4)
            diagnosis = diagnose(notes, self.world)
            if self.rank == min(notes):
                self._print(diagnosis)
            else:
                time.sleep(0.5)  # launchers end all ranks with the first, which should be the one that reports
            end_later([process for rank, process in self.processes.items() if rank not in notes])
        except Exception as error:
            say(f"{diagnosis.text}; {in_one_line(error)}")
        finally:
            self.on_end(diagnosis)

    def _write_note(self, mine: Position) -> None:
        """Writes rank_N.txt, the stacks of all threads, then rank_N.json: when that exists, others may end the job."""
        try:
            _write(self.folders[0], mine)
        except OSError as error:
            with suppress(OSError):
                _write(self.folders[1], mine)
            lacking = f"{self.folders[0]} cannot be written ({in_one_line(error)}), see {self.folders[1]}"
            say(f"hang: rank {self.rank} is at {mine}; {lacking}")

    def _notes(self) -> dict[int, Position]:
        """Returns the notes of this start of the run, by rank."""
        found = {}
        for path in [path for folder in self.folders for path in folder.glob("rank_*.json")]:
            with suppress(OSError, ValueError, TypeError):
                position = Position(**json.loads(path.read_text()))
                if position.start == self.start_id:
                    found[position.rank] = position
        return found

    def _print(self, diagnosis: HangDiagnosis) -> None:
        say(f"{diagnosis.text}; stacks of all ranks: {self.folder / STACKS}")
        self._event("hang", **diagnosis._asdict())
        with suppress(Exception):  # the job ends, whatever a tracker does
            self.on_hang(diagnosis.text)

    def _event(self, kind: str, **facts: Any) -> None:
        with suppress(Exception), closing(Journal.appending(self.folder / "events.jsonl")) as journal:
            journal.event(kind, **facts)


def _write(stacks: Path, mine: Position) -> None:
    """Writes the two files of a note. Raises OSError if the folder cannot be written."""
    stacks.mkdir(mode=0o700, exist_ok=True)
    with (stacks / f"rank_{mine.rank}.txt").open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    note, temporary = stacks / f"rank_{mine.rank}.json", stacks / f"rank_{mine.rank}.json.tmp"
    temporary.write_text(json.dumps(mine._asdict()))
    temporary.replace(note)


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
