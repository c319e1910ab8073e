"""The hang guard: a collective that does not complete in time ends the job, and all ranks say first where they are.

A thread of each rank looks at the pulse of the thread that trains. One that has waited too long writes down where it is, and so
do all that see such a note in the run folder, hung or not: a rank without a note is frozen or gone. Then the first of them names
the rank that the others wait for.
"""

import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread, main_thread

from ...parallel.pulse import PULSE, name_layers
from ..journal import Journal
from ..session import Session
from .blame import Beat, Verdict, blame
from .exit_codes import ExitCode

STACKS = "stacks"
"""The folder in the run folder: rank_N.txt, the stacks of all threads, and rank_N.json, where the thread that trains was."""


class Watchdog:
    """Watches the thread that trains from `start` to `close`."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        timeout_seconds: float,
        end: Callable[[Verdict], None] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """`end` is called on every rank when all is said; by default the process ends at once, as its main thread cannot. `tell` is
        called before that on the rank that speaks."""
        self.folder, self.rank, self.world, self.timeout = folder, rank, world, timeout_seconds
        self.tick = min(2.0, timeout_seconds / 20)
        self.end = end or (lambda _: os._exit(int(ExitCode.hang)))
        self.tell = tell or (lambda _: None)
        self.begin = time.time()
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
            late = time.monotonic() - PULSE.since > self.timeout
            if (late and waits_for() is not None) or self._notes():
                self._report()
                return

    def _report(self) -> None:
        self._write_note()
        deadline = time.monotonic() + 2 * self.tick + 1
        while len(notes := self._notes()) < self.world and time.monotonic() < deadline:
            time.sleep(self.tick / 4)
        verdict = blame(notes, self.world)
        if self.rank == min(notes, default=self.rank):
            self._say(verdict)
        else:
            time.sleep(0.5)  # launchers end all ranks with the first: let it be the one that speaks
        self.end(verdict)

    def _write_note(self) -> None:
        """The stacks first: once the note is there, others may end the job."""
        stacks = self.folder / STACKS
        stacks.mkdir(exist_ok=True)
        with (stacks / f"rank_{self.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        note, temporary = stacks / f"rank_{self.rank}.json", stacks / f"rank_{self.rank}.json.tmp"
        temporary.write_text(json.dumps(current(self.rank)._asdict()))
        temporary.replace(note)

    def _notes(self) -> dict[int, Beat]:
        """Of this start of the run, by rank."""
        found = {}
        for path in (self.folder / STACKS).glob("rank_*.json"):
            with suppress(OSError, ValueError, TypeError):
                beat = Beat(**json.loads(path.read_text()))
                if beat.time >= self.begin:
                    found[beat.rank] = beat
        return found

    def _say(self, verdict: Verdict) -> None:
        print(f"tokenyard: {verdict.text}; stacks of all ranks: {self.folder / STACKS}", file=sys.stderr, flush=True)
        journal = Journal.appending(self.folder / "events.jsonl")
        journal.event("hang", **verdict._asdict())
        journal.close()
        with suppress(Exception):  # the job ends, whatever a tracker does
            self.tell(verdict.text)


@contextmanager
def watched(session: Session, tell: Callable[[str], None]) -> Iterator[None]:
    """The hang guard of this rank, if there are others. `tell` hears of a hang, from another thread."""
    mesh = session.parallel.mesh
    if mesh.world == 1:
        yield
        return
    name_layers(session.parallel.model.blocks)
    dog = Watchdog(session.folder, mesh.rank, mesh.world, session.config.parallel.timeout_seconds, tell=tell).start()
    try:
        yield
    finally:
        dog.close()


def current(rank: int) -> Beat:
    """Where the thread that trains is now."""
    p = PULSE
    return Beat(rank, p.step, p.phase, p.layer, waits_for(), p.number, round(time.monotonic() - p.since, 3), time.time())


def waits_for() -> str | None:
    """The collective that the thread that trains is in: one of ours, or one of torch's own, as FSDP's, by its stack."""
    if PULSE.collective is not None:
        return PULSE.collective
    frame = sys._current_frames().get(main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_filename.endswith("distributed_c10d.py"):
            return f"{frame.f_code.co_name} of torch"
        frame = frame.f_back
    return None
