"""Supervises a run while it trains: guard of the steps, stop requests, comparison of replicas, stragglers."""

from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

from ...parallel.failpoints import failpoint
from ...parallel.progress import PROGRESS
from ..exit import ExitCode, RunStop
from ..logging.run_logger import RunLogger
from ..session import Session
from ..step_flags import GlobalFlags, RankFlags
from .replicas import Replicas
from .signals import STOP_REQUESTS, StopRequests
from .step_guard import Guard

SHARE = 0.1
"""A rank is reported if the others lose this share of their time because of it."""


class Stragglers:
    """Finds a slow rank: every few steps the ranks compare their own time of a step, without the time spent waiting for others.

    It is the host's time: computation, data and input of this rank. On a GPU the computation shows where the host waits for it.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.own: list[float] = []
        self.whole: list[float] = []
        self.begin: tuple[float, float] | None = None
        self.suspect: int | None = None
        """The slow rank of the last comparison: one slow stretch is chance, two are not."""
        self.alerted: int | None = None
        """The rank of the last alert: there is one alert for a rank, and an event each time."""

    def seconds(self, step: int) -> float | None:
        """Called when a step begins. Returns the median of this rank's own seconds, on steps on which all ranks report it."""
        now = perf_counter(), PROGRESS.waited
        if self.begin is not None:
            whole = now[0] - self.begin[0]
            self.whole.append(whole)
            self.own.append(whole - (now[1] - self.begin[1]))
        self.begin = now
        if not self.every or step % self.every:
            return None
        own, self.own = median(self.own or [0.0]), []
        return own

    def compare(self, step: int, seconds: list[float], run_logger: RunLogger) -> None:
        """Reports the slowest rank if it costs the others much. `seconds`: those of each rank, empty if they were not reported."""
        if not seconds or not self.whole:
            return
        whole, self.whole = median(self.whole), []
        rank = max(range(len(seconds)), key=seconds.__getitem__)
        own, others = seconds[rank], median(seconds[:rank] + seconds[rank + 1 :] or [seconds[rank]])
        lost = (own - others) / max(whole, 1e-9)
        before, self.suspect = self.suspect, rank if lost >= SHARE else None
        if self.suspect is None or self.suspect != before:
            return
        run_logger.log_event("straggler", step=step, rank=rank, seconds=own, others=others, lost_share=lost)
        if self.alerted != rank:
            text = f"rank {rank} is slow: {own:.3f} s a step of its own, the others {others:.3f} s; {lost:.0%} of all time"
            run_logger.alert("straggler", text)
        self.alerted = rank


@dataclass
class Supervisor:
    """Supervises one run on this rank. Every rank makes the same decisions, because they follow from the global flags."""

    session: Session
    run_logger: RunLogger
    guard: Guard
    stragglers: Stragglers
    replicas: Replicas
    stop_requests: StopRequests = field(default_factory=lambda: STOP_REQUESTS)
    bad_data: str | None = None
    """Why this rank could not read its rows."""

    def rank_flags(self) -> RankFlags:
        """Returns this rank's flags for the step that begins."""
        step, first = self.session.step + 1, self.session.parallel.mesh.rank == 0
        PROGRESS.step = step
        failpoint("step.begin", step)
        folder, requests = self.session.folder, self.stop_requests
        if first and (folder / "stop").exists() and "touch stop" not in requests.stops:
            requests.stops.append("touch stop")
        save = requests.saves > requests.granted or (first and (folder / "save").exists())
        stop, seconds = bool(requests.stops), self.stragglers.seconds(step)
        snapshot = first and (folder / "snapshot").exists()
        return RankFlags(stop, save, self.bad_data is not None, *self.session.saver.flags(), seconds, snapshot)

    def handle_flags(self, global_flags: GlobalFlags) -> None:
        """Acts after a step on the flags that are not about its numbers. Raises RunStop if the run was asked to stop."""
        self.stragglers.compare(self.session.step, global_flags.seconds, self.run_logger)
        if self.replicas.every and self.session.step % self.replicas.every == 0:
            self.replicas.compare()
        if global_flags.stop:
            raise RunStop(f"on request ({', '.join(self.stop_requests.stops) or 'of another rank'})", ExitCode.done)

    def grant_save(self) -> None:
        """Marks the requests for a checkpoint as granted: this step has one."""
        self.stop_requests.granted = self.stop_requests.saves
        self.remove_request("save")

    def remove_request(self, name: str) -> None:
        """Removes RUN/save, RUN/stop or RUN/snapshot, so that it is granted once; ignores a folder that cannot be written."""
        if self.session.parallel.mesh.rank == 0:
            with suppress(OSError):
                (self.session.folder / name).unlink(missing_ok=True)


def build_supervisor(session: Session, run_logger: RunLogger) -> Supervisor:
    """Returns a supervisor with the state that the checkpoint contains, if the run was resumed."""
    guard = Guard(session.config.numerics)
    guard.restore(session.extra.get("guard", {}))
    stragglers = Stragglers(session.config.debug.stragglers_every)
    return Supervisor(session, run_logger, guard, stragglers, Replicas(session, run_logger))
