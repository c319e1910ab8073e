"""The hang guard: a collective that does not complete in time ends the job, and all ranks say first where they are.

A thread of each rank looks at the pulse of the thread that trains. One that has waited too long writes down where it is, and so
do all that see such a note in RUN/stacks, hung or not: a rank without a note is frozen or gone. Then the first of them names
the rank that the others wait for. Where RUN/stacks cannot be written, the host's folder for temporary files takes the notes.
The same thread ends the process if another rank has left a note that it failed alone. No clock on the wall is asked: those of
hosts differ, and they are set back.
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
from ..exit import ExitCode, RunStop, in_one_line, say_failure
from ..logging.journal import Journal
from ..session import Session
from .failure_note import STACKS, Failure, find_note, leave_note
from .processes import Process, end_later, this_process

# Which rank the others wait for, from where each of them says it is.


class Beat(NamedTuple):
    """Where the thread that trains was on one rank."""

    rank: int
    step: int
    phase: str
    layer: int | None
    collective: str | None
    """None: it did not wait for others."""
    number: int
    """Collectives begun."""
    seconds: float
    """For which it had been there."""
    start: str
    """Which start of the run it is of."""

    def place(self) -> str:
        """In words."""
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


def blame(beats: dict[int, Beat], world: int) -> HangDiagnosis:
    """In this order: ranks that do not answer, that wait for nobody, that are behind, that wait for something else than most."""
    ranks, why = _late(beats, world)
    waiting = [beat for beat in beats.values() if beat.rank not in ranks] or list(beats.values())
    others = max(waiting, key=lambda beat: beat.seconds)
    where = [f"rank {rank} ({beats[rank].place() if rank in beats else 'no answer'})" for rank in ranks]
    text = f"hang: {', '.join(where)} {why}; the others wait: {others.place()}"
    return HangDiagnosis(ranks, text, others.step, others.phase, others.layer, others.collective)


def _late(beats: dict[int, Beat], world: int) -> tuple[list[int], str]:
    silent = [rank for rank in range(world) if rank not in beats]
    if silent:
        return silent, "is frozen, or its host is gone"
    busy = [rank for rank, beat in beats.items() if beat.collective is None]
    if busy:
        return busy, "does not come to it"
    fewest = min(beat.number for beat in beats.values())
    behind = [rank for rank, beat in beats.items() if beat.number == fewest]
    if len(behind) < len(beats):
        return behind, "is behind"
    return _elsewhere(beats), "has left one out, or does another"


def _elsewhere(beats: dict[int, Beat]) -> list[int]:
    """All have begun equally many: those at another place than most; with as many here as there, those that are further."""
    places = {rank: (beat.step, beat.phase, beat.layer, beat.collective) for rank, beat in beats.items()}
    counts = Counter(places.values())
    if len(counts) == 1:
        return sorted(beats)
    furthest = {place: max(beats[rank].step for rank in beats if places[rank] == place) for place in counts}
    rarest = min(counts, key=lambda place: (counts[place], -furthest[place]))
    return [rank for rank in beats if places[rank] == rarest]


GRACE_SECONDS = 3.0
"""In which the thread that trains may leave by itself when another rank has failed."""


class Watchdog:
    """Watches the thread that trains from `start` to `close`."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        timeout_seconds: float,
        end: Callable[[HangDiagnosis], None] | None = None,
        tell: Callable[[str], None] | None = None,
        leave: Callable[[int], None] | None = None,
        start: str = "",
    ) -> None:
        """`end` is called on every rank when all is said; by default the process ends at once, as its main thread cannot. `tell` is
        called before that on the rank that speaks, and `leave` with the exit code where another rank failed. `start` is the same on
        all ranks and in no other start of the run."""
        self.folder, self.rank, self.world, self.timeout = folder, rank, world, timeout_seconds
        self.tick = min(2.0, timeout_seconds / 20)
        self.end = end or (lambda _: os._exit(int(ExitCode.hang)))
        self.tell = tell or (lambda _: None)
        self.leave = leave or (lambda _: None)
        self.start_id = start
        self.places = [folder / STACKS, Path(tempfile.gettempdir()) / f"tokenyard-{start or os.getpid()}"]
        self.processes: dict[int, Process] = {}
        """Of the ranks, where that is known."""
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
                self._leave_with(failure)
                return
            late = time.monotonic() - PROGRESS.since > self.timeout
            if (late and waits_for() is not None) or self._notes():
                self._report()
                return

    def _leave_with(self, failure: Failure) -> None:
        """Unless the thread that trains finds out by itself, as with gloo."""
        if self.closed.wait(GRACE_SECONDS):
            return
        if self.rank == 0 and failure.code == ExitCode.error:
            self._event("failed", step=failure.step, error=failure.text)
        with suppress(Exception):  # the process ends, whatever a tracker does
            self.leave(failure.code)
        os._exit(failure.code)

    def _report(self) -> None:
        """Whatever fails here, the process ends and this rank has said where it was."""
        mine = current(self.rank, self.start_id)
        verdict = HangDiagnosis([], f"hang: rank {self.rank} waits: {mine.place()}")
        try:
            self._write_note(mine)
            deadline = time.monotonic() + 2 * self.tick + 1
            while len(notes := self._notes() | {self.rank: mine}) < self.world and time.monotonic() < deadline:
                time.sleep(self.tick / 4)
            verdict = blame(notes, self.world)
            if self.rank == min(notes):
                self._say(verdict)
            else:
                time.sleep(0.5)  # launchers end all ranks with the first: let it be the one that speaks
            end_later([process for rank, process in self.processes.items() if rank not in notes])
        except Exception as error:
            say(f"{verdict.text}; {in_one_line(error)}")
        finally:
            self.end(verdict)

    def _write_note(self, mine: Beat) -> None:
        """rank_N.txt, the stacks of all threads, then rank_N.json, where this one was: once it is there, others may end the job."""
        place, lacking = self.places[0], ""
        try:
            _write(place, mine)
        except OSError as error:
            lacking, place = in_one_line(error), self.places[1]
            with suppress(OSError):
                _write(place, mine)
        if lacking:
            text = f"hang: rank {self.rank} is at {mine.place()}; {self.places[0]} cannot be written ({lacking}), see {place}"
            say(text)

    def _notes(self) -> dict[int, Beat]:
        """Of this start of the run, by rank."""
        found = {}
        for path in [path for place in self.places for path in place.glob("rank_*.json")]:
            with suppress(OSError, ValueError, TypeError):
                beat = Beat(**json.loads(path.read_text()))
                if beat.start == self.start_id:
                    found[beat.rank] = beat
        return found

    def _say(self, verdict: HangDiagnosis) -> None:
        say(f"{verdict.text}; stacks of all ranks: {self.folder / STACKS}")
        self._event("hang", **verdict._asdict())
        with suppress(Exception):  # the job ends, whatever a tracker does
            self.tell(verdict.text)

    def _event(self, kind: str, **facts: Any) -> None:
        with suppress(Exception), closing(Journal.appending(self.folder / "events.jsonl")) as journal:
            journal.event(kind, **facts)


def _write(stacks: Path, mine: Beat) -> None:
    """OSError if that folder does not take it."""
    stacks.mkdir(mode=0o700, exist_ok=True)
    with (stacks / f"rank_{mine.rank}.txt").open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    note, temporary = stacks / f"rank_{mine.rank}.json", stacks / f"rank_{mine.rank}.json.tmp"
    temporary.write_text(json.dumps(mine._asdict()))
    temporary.replace(note)


@contextmanager
def watched(session: Session, tell: Callable[[str], None], leave: Callable[[int], None] | None = None) -> Iterator[None]:
    """The hang guard of this rank, if there are others. `tell` hears of a hang, `leave` of another rank's end."""
    mesh = session.parallel.mesh
    if mesh.world == 1:
        yield
        return
    name_layers(session.parallel.model.blocks)
    start = from_first(lambda: secrets.token_hex(8))
    dog = Watchdog(session.folder, mesh.rank, mesh.world, session.config.parallel.timeout_seconds, None, tell, leave, start)
    dog.processes = dict(enumerate(from_all(this_process())))
    dog.start()
    try:
        yield
    except (DataStop, RunStop, SaveFailed):  # on every rank
        raise
    except Exception as error:
        say_failure(error)
        leave_note(session.folder, Failure(mesh.rank, session.step, in_one_line(error), int(ExitCode.error)))
        raise
    finally:
        dog.close()


def current(rank: int, start: str = "") -> Beat:
    """Where the thread that trains is now."""
    p = PROGRESS
    return Beat(rank, p.step, p.phase, p.layer, waits_for(), p.number, round(time.monotonic() - p.since, 3), start)


def waits_for() -> str | None:
    """The collective that the thread that trains is in: one of ours, or one of torch's own, as FSDP's, by its stack."""
    if PROGRESS.collective is not None:
        return PROGRESS.collective
    frame = sys._current_frames().get(main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_filename.endswith("distributed_c10d.py"):
            return f"{frame.f_code.co_name} of torch"
        frame = frame.f_back
    return None
