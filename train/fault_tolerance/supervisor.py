"""Supervises a run while it trains: guard of the steps, stop requests, comparison of replicas, stragglers."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ...parallel.failpoints import failpoint
from ...parallel.progress import PROGRESS
from ..exit import ExitCode, RunStop
from ..logging.run_logger import RunLogger
from ..session import Session
from ..step_flags import GlobalFlags, RankFlags
from .replicas import Replicas
from .signals import STOP_REQUESTS, StopRequests
from .step_guard import Guard
from .stragglers import Stragglers


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
        return RankFlags(stop, save, self.bad_data is not None, *self.session.saver.flags(), seconds)

    def handle_flags(self, global_flags: GlobalFlags) -> None:
        """Acts after a step on the flags that are not about its numbers. Raises RunStop if the run was asked to stop."""
        self.stragglers.compare(self.session.step, global_flags.seconds, self.run_logger)
        if self.replicas.due():
            self.replicas.compare()
        if global_flags.stop:
            raise RunStop(f"on request ({', '.join(self.stop_requests.stops) or 'of another rank'})", ExitCode.done)

    def grant_save(self) -> None:
        """Marks the requests for a checkpoint as granted: this step has one."""
        self.stop_requests.granted = self.stop_requests.saves
        self.remove_request("save")

    def remove_request(self, name: str) -> None:
        """Removes RUN/save or RUN/stop, so that it is granted once; ignores a folder that cannot be written."""
        if self.session.parallel.mesh.rank == 0:
            with suppress(OSError):
                (self.session.folder / name).unlink(missing_ok=True)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint contains of this: plain JSON."""
        return {"guard": self.guard.state()}


def build_supervisor(session: Session, run_logger: RunLogger) -> Supervisor:
    """Returns a supervisor with the state that the checkpoint contains, if the run was resumed."""
    guard = Guard(session.config.numerics)
    guard.restore(session.extra.get("guard", {}))
    stragglers = Stragglers(session.config.debug.stragglers_every)
    return Supervisor(session, run_logger, guard, stragglers, Replicas(session, run_logger))
