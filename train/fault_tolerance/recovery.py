"""One optimizer step of a run, and what is done when its numbers are wrong: repeat, then stop, skip or roll back."""

from ...moe.token_info import BatchPosition
from ...parallel.object_collectives import from_all
from ..batch import Rows
from ..checkpointing import finished
from ..config.complain import say
from ..config.private_files import writing_to
from ..exit import ExitCode, RunStop
from ..nonfinite import bad_gradients
from ..resume import keep_timeline, newest_whole, resume
from ..session import Session
from ..step import StepInput, StepNumbers
from ..step_flags import GlobalFlags
from .step_guard import Action, Fault
from .supervisor import Supervisor


def attempt(session: Session, supervisor: Supervisor, rows: list[Rows], lr: float) -> StepNumbers:
    """A step on these rows, once more if something is wrong with it; `updated` says whether one of them was taken."""
    guard, step = supervisor.guard, session.step + 1
    position, rank_flags = BatchPosition(session.config.seed, step), supervisor.rank_flags()
    batch = StepInput(rows, lr, session.config.optimizer.clip_norm, position, rank_flags, guard.accepts)
    numbers = session.engine.step(batch._replace(overlap_fn=lambda: session.feed.prepare(step)))
    fault = guard.fault(numbers.global_flags)
    if fault is None or fault.kind == "bad_data":
        return numbers
    tensors = bad_gradients(session.parallel)
    again = session.engine.step(batch._replace(rank_flags=rank_flags._replace(seconds=None), accepts=guard.accepts_again))
    repeated = "persistent" if guard.fault(again.global_flags) else "transient"
    text = f"step {step}: {fault.text}; repeated, it was {'there again' if repeated == 'persistent' else 'gone'}"
    supervisor.reporter.event(fault.kind, step=step, rank=numbers.global_flags.rank, tensors=tensors, again=repeated, text=text)
    supervisor.reporter.alert(fault.kind, text)
    return again


def recover(session: Session, supervisor: Supervisor, global_flags: GlobalFlags) -> None:
    """The step after `session.step` cannot be taken: do what the policy says. RunStop if that is to stop."""
    step, fault = session.step + 1, supervisor.guard.fault(global_flags)
    assert fault is not None
    if fault.kind == "bad_data" and supervisor.bad_data is not None:
        say(f"rank {session.parallel.mesh.rank}: {supervisor.bad_data}")
    if fault.action is Action.stop:
        code = ExitCode.bad_data if fault.kind == "bad_data" else ExitCode.not_finite
        raise RunStop(f"step {step}: {fault.text}", code)
    if not supervisor.guard.may_go_on():
        rule = f"numerics.max_skips={session.config.numerics.max_skips} steps were skipped or rolled back"
        raise RunStop(f"step {step}: {fault.text}; {rule} before", ExitCode.not_finite)
    if fault.action is Action.skip:
        skip(session, supervisor)
    else:
        roll_back(session, supervisor, fault)


def skip(session: Session, supervisor: Supervisor) -> None:
    """Without an update; AdamW does not count it."""
    session.step += 1
    supervisor.guard.skipped += 1
    supervisor.reporter.event("skipped", step=session.step)


def roll_back(session: Session, supervisor: Supervisor, fault: Fault) -> None:
    """To the newest checkpoint, from which the run comes here again, and around the step."""
    step = session.step + 1
    for outcome in finished(session):
        supervisor.reporter.saved(outcome)
    path = newest_whole(session)
    if path is None:
        raise RunStop(f"step {step}: {fault.text}; there is no checkpoint to roll back to", ExitCode.not_finite)
    resume(session, path)
    lacking = None
    try:
        keep_timeline(session)
        with writing_to(session.folder):
            supervisor.reporter.rolled_back(session, step)
    except ValueError as error:
        lacking = str(error)
    if found := [
        each for each in from_all(lacking) if each is not None
    ]:  # the journals of the first rank, which the others wait for
        raise RunStop(f"step {step}: {fault.text}; not rolled back: {found[0]}", ExitCode.not_finite, saves=False)
    supervisor.guard.jumps.add(step)
    supervisor.guard.restore(session.extra.get("guard", {}))
