"""All that looks after a run while it trains: one object for the loop, so that the loop stays a loop."""

from dataclasses import dataclass, field
from typing import Any

from ...parallel.failpoints import failpoint
from ...parallel.progress import PULSE
from ..exit import ExitCode, RunStop
from ..logging.run_logger import Reporter
from ..session import Session
from ..step_flags import Telling, Told
from .replicas import Replicas
from .signals import WISHES, RequestFiles, Wishes
from .step_guard import Guard
from .stragglers import Stragglers


@dataclass
class Care:
    """Of one run on this rank. What it decides from what ranks told is the same on every rank."""

    session: Session
    reporter: Reporter
    guard: Guard
    stragglers: Stragglers
    replicas: Replicas
    files: RequestFiles
    wishes: Wishes = field(default_factory=lambda: WISHES)
    bad_data: str | None = None
    """Why this rank could not read its rows."""

    def telling(self) -> Telling:
        """What this rank has to tell the others in the step that begins."""
        step, first = self.session.step + 1, self.session.parallel.mesh.rank == 0
        PULSE.step = step
        failpoint("step.begin", step)
        if first and self.files.asks("stop") and "touch stop" not in self.wishes.stops:
            self.wishes.stops.append("touch stop")
        save = self.wishes.save or (first and self.files.asks("save"))
        stop, seconds = bool(self.wishes.stops), self.stragglers.seconds(step)
        return Telling(stop, save, self.bad_data is not None, *self.session.saver.flags(), seconds)

    def heard(self, told: Told) -> None:
        """After a step: what the ranks told that is not about its numbers."""
        self.stragglers.compare(self.session.step, told.seconds, self.reporter)
        if self.replicas.due():
            self.replicas.compare()
        if told.stop:
            raise RunStop(f"on request ({', '.join(self.wishes.stops) or 'of another rank'})", ExitCode.done)

    def saved(self) -> None:
        """A checkpoint of the current step is there: wishes for one are granted."""
        self.wishes.granted = self.wishes.saves
        if self.session.parallel.mesh.rank == 0:
            self.files.granted("save")

    def stopped(self) -> None:
        """The run ends as it was asked to."""
        if self.session.parallel.mesh.rank == 0:
            self.files.granted("stop")

    def state(self) -> dict[str, Any]:
        """For the checkpoint: plain JSON."""
        return {"guard": self.guard.state()}


def build_care(session: Session, reporter: Reporter) -> Care:
    """Goes on from what the checkpoint kept, if the run was resumed."""
    guard = Guard(session.config.numerics)
    guard.restore(session.extra.get("guard", {}))
    stragglers = Stragglers(session.config.debug.stragglers_every)
    replicas, files = Replicas(session, reporter), RequestFiles(session.folder)
    return Care(session, reporter, guard, stragglers, replicas, files)
