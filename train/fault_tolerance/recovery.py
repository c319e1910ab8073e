"""Runs one optimizer step of a run. If its numbers are wrong it is repeated, and then the policy says: stop, skip or roll back."""

from functools import partial

from ...moe.token_info import BatchPosition
from ...parallel.object_collectives import from_all
from ..batch import Rows
from ..checkpointing import wait_for_save
from ..config.complain import say
from ..config.own_files import writing_to
from ..exit import ExitCode, RunStop, too_little_room
from ..resume import keep_timeline, newest_intact, resume
from ..session import Session
from ..state import bad_gradients
from ..step import StepInput, StepNumbers
from ..step_flags import GlobalFlags
from .step_guard import Action, Fault
from .supervisor import Supervisor


def run_step(session: Session, supervisor: Supervisor, rows: list[Rows], lr: float) -> StepNumbers:
    """Runs a step on these rows, and repeats it once if it has a fault. `updated` says whether one of the two was accepted."""
    guard, step = supervisor.guard, session.step + 1
    position, rank_flags = BatchPosition(session.config.seed, step), supervisor.rank_flags()
    optimizer = session.config.optimizer
    step_input = StepInput(rows, lr, optimizer.clip_norm, position, rank_flags, guard.accepts, qk_clip=optimizer.qk_clip)
    numbers = session.engine.step(step_input._replace(overlap_fn=partial(session.batch_loader.prepare, step)))
    fault = guard.fault(numbers.global_flags)
    if fault is None or fault.kind in ("bad_data", "overflow"):
        return numbers
    tensors = bad_gradients(session.parallel)
    again = session.engine.step(step_input._replace(rank_flags=rank_flags._replace(seconds=None), accepts=guard.accepts_again))
    repeated = "persistent" if guard.fault(again.global_flags) else "transient"
    text = f"step {step}: {fault.text}; repeated, it was {'there again' if repeated == 'persistent' else 'gone'}"
    rank = numbers.global_flags.rank
    supervisor.run_logger.log_event(fault.kind, step=step, rank=rank, tensors=tensors, again=repeated, text=text)
    supervisor.run_logger.alert(fault.kind, text)
    return again


def recover(session: Session, supervisor: Supervisor, global_flags: GlobalFlags) -> None:
    """Does what the policy says about the step after `session.step`, which was not accepted. Raises RunStop if that is to stop."""
    step, fault = session.step + 1, supervisor.guard.fault(global_flags)
    assert fault is not None
    if fault.kind == "bad_data" and supervisor.bad_data is not None:
        say(f"rank {session.parallel.mesh.rank}: {supervisor.bad_data}")
    if fault.kind == "overflow":
        raise RunStop(f"step {step}: {too_little_room(session.config.parallel, global_flags.overflow)}", ExitCode.overflow)
    if fault.action is Action.stop:
        code = ExitCode.bad_data if fault.kind == "bad_data" else ExitCode.not_finite
        raise RunStop(f"step {step}: {fault.text}", code)
    if not supervisor.guard.may_intervene():
        rule = f"numerics.max_skips={session.config.numerics.max_skips} steps were skipped or rolled back"
        raise RunStop(f"step {step}: {fault.text}; {rule} before", ExitCode.not_finite)
    if fault.action is Action.skip:  # AdamW does not count the step
        session.step += 1
        supervisor.guard.skipped += 1
        supervisor.run_logger.log_event("skipped", step=session.step)
    else:
        roll_back(session, supervisor, fault)


def roll_back(session: Session, supervisor: Supervisor, fault: Fault) -> None:
    """Returns to the newest checkpoint. The run will come to this step again, and jump over it."""
    step, run_logger = session.step + 1, supervisor.run_logger
    for outcome in wait_for_save(session):
        run_logger.log_checkpoint(outcome)
    path = newest_intact(session)
    if path is None:
        raise RunStop(f"step {step}: {fault.text}; there is no checkpoint to roll back to", ExitCode.not_finite)
    resume(session, path)
    if session.local is not None:
        session.local.clear()  # they are later, and of steps that are done again
    error = None
    try:
        keep_timeline(session)
        with writing_to(session.folder):
            run_logger.log_rollback(step)
    except ValueError as refusal:  # on rank 0, which has the journals and for which the others wait
        error = str(refusal)
    if errors := [each for each in from_all(error) if each is not None]:
        raise RunStop(f"step {step}: {fault.text}; not rolled back: {errors[0]}", ExitCode.not_finite, saves=False)
    supervisor.guard.jumps.add(step)
    supervisor.guard.restore(session.extra.get("guard", {}))
