"""What the watchdogs of a job tell each other, by files: one look at this host while all is well, O(1) files a rank in a hang.

While all is well, one rank of each host looks at the run folder. The others look at a file in the host's memory, whose time says
when a rank of this host last looked there, by the monotonic clock that its processes share. If that was long ago, because the rank
is frozen, the next one looks. Whoever finds an alarm copies it into the file.

An alarm is the note of exit.py: a rank has failed alone, or is overdue. When ranks hang, each writes where it is. The one that
raised the alarm collects that and writes the diagnosis, and the others read the diagnosis alone. If it dies meanwhile, another
one collects. Where the run folder cannot be written, the host's folder for temporary files takes its place.
"""

import faulthandler
import json
import os
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..exit import STACKS, ExitCode, Failure, find_note, leave_note, read_note
from .hang_diagnosis import HangDiagnosis, Position, diagnose

MEMORY = Path("/dev/shm")
"""A folder in the memory of the host."""
VERDICT, SECOND = f"{STACKS}/hang.json", f"{STACKS}/second.json"
"""The diagnosis, and the claim of the rank that collects when the first one to do so has not answered."""


class Settled(NamedTuple):
    diagnosis: HangDiagnosis | None
    """None if nobody answered."""
    collected: bool
    """Whether this rank has made it."""


class Notices:
    """The files through which the watchdog of this rank hears of others and tells them."""

    def __init__(
        self, folder: Path, rank: int, world: int, tick: float, start: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`tick`: seconds between looks at the run folder. `start`: the same on all ranks, another in each start of the run."""
        self.rank, self.world, self.tick, self.start, self.clock = rank, world, tick, start, clock
        temporary, name = Path(tempfile.gettempdir()), f"tokenyard-{start or os.getpid()}"
        self.folders = [folder, temporary / name]
        self.local = (MEMORY if os.access(MEMORY, os.W_OK) else temporary) / f"{name}.alarm"
        self.patience = tick * (0.8 if os.environ.get("LOCAL_RANK", "0") == "0" else 2.0)
        """How long ago the last look of this host may be; a rank other than the first steps in later."""
        self.looked = -self.patience

    def look(self) -> Failure | None:
        """Returns the alarm, None while there is none: one `stat` in memory, and for one rank of the host one look at RUN."""
        now, last = self.clock(), self.looked
        with suppress(OSError):
            seen = self.local.stat()
            if seen.st_size:
                return read_note(self.local)
            last = max(last, seen.st_mtime_ns / 1e9)
        if last <= now < last + self.patience:
            return None
        self.looked, found = now, find_note(self.folders[0])
        alarm = found if found is not None and found.start in ("", self.start) else None
        self._tell_host(alarm)
        return alarm

    def _tell_host(self, alarm: Failure | None) -> None:
        """Writes the alarm, or the time of this look, into the file of the host, if that can be written."""
        with suppress(OSError):
            if alarm is None:
                os.close(os.open(self.local, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
                os.utime(self.local, ns=(int(self.looked * 1e9), int(self.looked * 1e9)))
            else:
                _replace(self.local, alarm, self.rank)

    def put(self, mine: Position) -> OSError | None:
        """Writes rank_N.txt, the stacks of all threads, and rank_N.json. Returns why RUN/stacks does not take them, if so."""
        try:
            _put(self.folders[0], mine)
        except OSError as error:
            self.folders.reverse()
            with suppress(OSError):
                _put(self.folders[0], mine)
            return error
        return None

    def settle(self, mine: Position) -> Generator[float, None, Settled]:
        """Raises the alarm and agrees on a diagnosis with the other ranks. Yields seconds to wait. Call `put` before."""
        alarm = Failure(mine.rank, mine.step, f"no progress for {mine.seconds:.0f} s", int(ExitCode.hang), self.start)
        collects = leave_note(self.folders[0], alarm)
        self._tell_host(alarm)
        limit = 2 * self.tick + 1
        for _ in range(2):
            if collects:
                return Settled((yield from self._collect(mine, self.clock() + limit)), True)
            deadline = self.clock() + 2 * limit
            while self.clock() < deadline:
                if (verdict := self._read_verdict()) is not None:
                    return Settled(verdict, False)
                yield self.tick / 2
            collects = leave_note(self.folders[0], alarm, SECOND)
        return Settled(None, False)

    def _collect(self, mine: Position, deadline: float) -> Generator[float, None, HangDiagnosis]:
        """Reads the note of each rank once, and writes the diagnosis."""
        notes = {mine.rank: mine}
        while len(notes) < self.world and self.clock() < deadline:
            yield self.tick / 4
            for folder in self.folders:
                notes |= self._read_notes(folder / STACKS, notes)
        verdict = diagnose(notes, self.world)
        with suppress(OSError):
            _replace(self.folders[0] / VERDICT, {"start": self.start, **verdict._asdict()}, self.rank)
        return verdict

    def _read_notes(self, stacks: Path, known: dict[int, Position]) -> dict[int, Position]:
        """Returns the notes of this start of the run that are not known yet, by rank."""
        found, paths = {}, []
        with suppress(OSError):
            paths = [path for path in stacks.iterdir() if path.suffix == ".json" and path.name.startswith("rank_")]
        for path in paths:
            with suppress(OSError, ValueError, TypeError):
                if int(path.stem[5:]) not in known:
                    position = Position(**json.loads(path.read_text()))
                    if position.start == self.start:
                        found[position.rank] = position
        return found

    def _read_verdict(self) -> HangDiagnosis | None:
        for folder in self.folders:
            with suppress(OSError, ValueError, TypeError):
                facts = json.loads((folder / VERDICT).read_text())
                if facts.pop("start") == self.start:
                    return HangDiagnosis(**facts)
        return None

    def close(self) -> None:
        """Removes the file of the host. Ranks that still want it make it again."""
        with suppress(OSError):
            self.local.unlink(missing_ok=True)


def _put(folder: Path, mine: Position) -> None:
    """Raises OSError if the folder cannot be written."""
    stacks = folder / STACKS
    for each in (folder, stacks):
        each.mkdir(mode=0o700, exist_ok=True)
    with (stacks / f"rank_{mine.rank}.txt").open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    _replace(stacks / f"rank_{mine.rank}.json", mine._asdict(), mine.rank)


def _replace(path: Path, value: Any, rank: int) -> None:
    """Writes `value` as JSON, at once: nobody reads a part of it."""
    temporary = path.with_name(f"{path.name}.{rank}.tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)
