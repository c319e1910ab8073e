"""When a run saves: only a state that is sound, and a wish for it is then granted."""

from typing import TYPE_CHECKING

from ...parallel.progress import doing
from ..reporter import Reporter
from ..session import Session
from ..survival.flags import Told
from .checkpointing import conclude, settled, started

if TYPE_CHECKING:
    from ..survival.care import Care


@doing("save")
def keep(session: Session, reporter: Reporter, care: "Care", durable: bool = False) -> None:
    """A checkpoint of this step, which goes on beside the training unless it must be `durable`. Collective.

    What is logged is told before: a run that goes on from here does not do it again.

    RunStop, and no checkpoint, if a number is not finite or copies differ; SaveFailed if the run needs the one that failed.
    """
    reporter.catch_up()
    with reporter.spent("checkpoint"):
        care.replicas.compare()
        session.extra = care.state()
        for outcome in conclude(session) if durable else started(session):
            reporter.saved(outcome)
    care.saved()


def settle(session: Session, reporter: Reporter, told: Told) -> None:
    """After each step: what became of the save under way, by what the ranks told each other in the step. Collective if it ended."""
    for outcome in settled(session, told.failed_writer > 0, told.writing > 0):
        reporter.saved(outcome)
