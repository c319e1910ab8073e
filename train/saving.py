"""When a run saves: only a state that is sound, and a wish for it is then granted."""

from typing import TYPE_CHECKING, Any

from ..parallel.pulse import doing
from .exit_codes import ExitCode
from .failures import bad_state
from .reporter import Reporter
from .session import Session, save
from .stop import RunStop

if TYPE_CHECKING:
    from .care import Care


@doing("save")
def keep(session: Session, reporter: Reporter, care: "Care") -> None:
    """A checkpoint of this step. RunStop, and no checkpoint, if a number is not finite or copies differ. Collective."""
    with reporter.spent("checkpoint"):
        care.replicas.compare()
        bad = bad_state(session.parallel, session.engine.held())
        if bad:
            text = f"{', '.join(bad)}: not finite after the update, so no checkpoint is written; the newest is {session.checkpoint}"
            raise RunStop(text, ExitCode.not_finite, saves=False)
        session.extra = care.state()
        path = save(session)
    reporter.saved(path)
    care.saved()


def writer_flags(session: Session) -> tuple[bool, bool]:
    """(this rank's writer of a checkpoint has failed, it is writing). Not collective."""
    saver: Any = getattr(session, "saver", None)
    return saver.flags() if saver else (False, False)
