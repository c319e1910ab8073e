"""All that looks after a run while it trains: one object for the loop, so that the loop stays a loop."""

from dataclasses import dataclass, field
from typing import Any

from ...parallel.failpoints import failpoint
from ...parallel.progress import PROGRESS
from ..exit import ExitCode, RunStop
from ..logging.run_logger import Reporter
from ..session import Session
from ..step_flags import GlobalFlags, RankFlags
from .replicas import Replicas
from .signals import STOP_REQUESTS, RequestFiles, StopRequests
from .step_guard import Guard
from .stragglers import Stragglers


@dataclass
class Supervisor:
    """Of one run on this rank. What it decides from what ranks told is the same on every rank."""

    session: Session
    reporter: Reporter
    guard: Guard
    stragglers: Stragglers
    replicas: Replicas
    files: RequestFiles
    stop_requests: StopRequests = field(default_factory=lambda: STOP_REQUESTS)
    bad_data: str | None = None
    """Why this rank could not read its rows."""

    def rank_flags(self) -> RankFlags:
        """What this rank has to tell the others in the step that begins."""
        step, first = self.session.step + 1, self.session.parallel.mesh.rank == 0
        PROGRESS.step = step
        failpoint("step.begin", step)
        if first and self.files.asks("stop") and "touch stop" not in self.stop_requests.stops:
            self.stop_requests.stops.append("touch stop")
        save = self.stop_requests.save or (first and self.files.asks("save"))
        stop, seconds = bool(self.stop_requests.stops), self.stragglers.seconds(step)
        return RankFlags(stop, save, self.bad_data is not None, *self.session.saver.flags(), seconds)

    def heard(self, global_flags: GlobalFlags) -> None:
        """After a step: what the ranks told that is not about its numbers."""
        self.stragglers.compare(self.session.step, global_flags.seconds, self.reporter)
        if self.replicas.due():
            self.replicas.compare()
        if global_flags.stop:
            raise RunStop(f"on request ({', '.join(self.stop_requests.stops) or 'of another rank'})", ExitCode.done)

    def saved(self) -> None:
        """A checkpoint of the current step is there: wishes for one are granted."""
        self.stop_requests.granted = self.stop_requests.saves
        if self.session.parallel.mesh.rank == 0:
            self.files.granted("save")

    def stopped(self) -> None:
        """The run ends as it was asked to."""
        if self.session.parallel.mesh.rank == 0:
            self.files.granted("stop")

    def state(self) -> dict[str, Any]:
        """For the checkpoint: plain JSON."""
        return {"guard": self.guard.state()}


def build_supervisor(session: Session, reporter: Reporter) -> Supervisor:
    """Goes on from what the checkpoint kept, if the run was resumed."""
    guard = Guard(session.config.numerics)
    guard.restore(session.extra.get("guard", {}))
    stragglers = Stragglers(session.config.debug.stragglers_every)
    replicas, files = Replicas(session, reporter), RequestFiles(session.folder)
    return Supervisor(session, reporter, guard, stragglers, replicas, files)
