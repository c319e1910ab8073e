"""One optimizer step of a run, and what is done when its numbers are wrong: repeat, then stop, skip or roll back."""

from collections.abc import Callable

from ...moe.token_info import Place
from ...parallel.object_collectives import from_all
from ..batch import Rows
from ..checkpointing import finished
from ..config.complain import say
from ..config.private_files import writing_to
from ..exit import ExitCode, RunStop
from ..nonfinite import bad_gradients
from ..resume import keep_timeline, newest_whole, resume
from ..session import Session
from ..step import StepNumbers
from ..step_flags import Telling, Told
from .step_guard import Action, Fault
from .supervisor import Care


def attempt(session: Session, care: Care, rows: list[Rows], lr: float) -> StepNumbers:
    """A step on these rows, once more if something is wrong with it; `updated` says whether one of them was taken."""
    guard, step = care.guard, session.step + 1
    place = Place(session.config.seed, step)

    def compute(telling: Telling, accepts: Callable[[Told], bool], meanwhile: Callable[[], None]) -> StepNumbers:
        return session.engine.step(rows, lr, session.config.optimizer.clip_norm, place, telling, accepts, meanwhile)

    telling = care.telling()
    numbers = compute(telling, guard.accepts, lambda: session.feed.prepare(step))
    fault = guard.fault(numbers.told)
    if fault is None or fault.kind == "bad_data":
        return numbers
    tensors = bad_gradients(session.parallel)
    again = compute(telling._replace(seconds=None), guard.accepts_again, lambda: None)
    repeated = "persistent" if guard.fault(again.told) else "transient"
    text = f"step {step}: {fault.text}; repeated, it was {'there again' if repeated == 'persistent' else 'gone'}"
    care.reporter.event(fault.kind, step=step, rank=numbers.told.rank, tensors=tensors, again=repeated, text=text)
    care.reporter.alert(fault.kind, text)
    return again


def recover(session: Session, care: Care, told: Told) -> None:
    """The step after `session.step` cannot be taken: do what the policy says. RunStop if that is to stop."""
    step, fault = session.step + 1, care.guard.fault(told)
    assert fault is not None
    if fault.kind == "bad_data" and care.bad_data is not None:
        say(f"rank {session.parallel.mesh.rank}: {care.bad_data}")
    if fault.action is Action.stop:
        code = ExitCode.bad_data if fault.kind == "bad_data" else ExitCode.not_finite
        raise RunStop(f"step {step}: {fault.text}", code)
    if not care.guard.may_go_on():
        rule = f"numerics.max_skips={session.config.numerics.max_skips} steps were skipped or rolled back"
        raise RunStop(f"step {step}: {fault.text}; {rule} before", ExitCode.not_finite)
    if fault.action is Action.skip:
        skip(session, care)
    else:
        roll_back(session, care, fault)


def skip(session: Session, care: Care) -> None:
    """Without an update; AdamW does not count it."""
    session.step += 1
    care.guard.skipped += 1
    care.reporter.event("skipped", step=session.step)


def roll_back(session: Session, care: Care, fault: Fault) -> None:
    """To the newest checkpoint, from which the run comes here again, and around the step."""
    step = session.step + 1
    for outcome in finished(session):
        care.reporter.saved(outcome)
    path = newest_whole(session)
    if path is None:
        raise RunStop(f"step {step}: {fault.text}; there is no checkpoint to roll back to", ExitCode.not_finite)
    resume(session, path)
    lacking = None
    try:
        keep_timeline(session)
        with writing_to(session.folder):
            care.reporter.rolled_back(session, step)
    except ValueError as error:
        lacking = str(error)
    if found := [
        each for each in from_all(lacking) if each is not None
    ]:  # the journals of the first rank, which the others wait for
        raise RunStop(f"step {step}: {fault.text}; not rolled back: {found[0]}", ExitCode.not_finite, saves=False)
    care.guard.jumps.add(step)
    care.guard.restore(session.extra.get("guard", {}))
