"""When a run saves: only a state that is sound, and a wish for it is then granted."""

from typing import TYPE_CHECKING

from ..parallel.pulse import doing
from .checkpointing import conclude, settled, started
from .exit_codes import ExitCode
from .failures import bad_state
from .flags import Told
from .reporter import Reporter
from .session import Session
from .stop import RunStop

if TYPE_CHECKING:
    from .care import Care


@doing("save")
def keep(session: Session, reporter: Reporter, care: "Care", durable: bool = False) -> None:
    """A checkpoint of this step, which goes on beside the training unless it must be `durable`. Collective.

    RunStop, and no checkpoint, if a number is not finite or copies differ; SaveFailed if the run needs the one that failed.
    """
    with reporter.spent("checkpoint"):
        if care.saved_step != session.step:
            care.replicas.compare()
            refuse_bad_state(session)
            session.extra = care.state()
        for outcome in conclude(session) if durable else started(session):
            reporter.saved(outcome)
    care.saved()


def settle(session: Session, reporter: Reporter, told: Told) -> None:
    """After each step: what became of the save under way, by what the ranks told each other in the step. Collective if it ended."""
    for outcome in settled(session, told.failed_writer > 0, told.writing > 0):
        reporter.saved(outcome)


def refuse_bad_state(session: Session) -> None:
    """RunStop if a weight or a moment is not finite."""
    bad = bad_state(session.parallel, session.engine.held())
    if bad:
        text = f"{', '.join(bad)}: not finite after the update, so no checkpoint is written; the newest is {session.checkpoint}"
        raise RunStop(text, ExitCode.not_finite, saves=False)
