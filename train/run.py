"""A training run: step, log, evaluate, checkpoint, stop."""

import logging
from contextlib import closing
from typing import NamedTuple

import torch

from ..data.build import DataPipeline
from ..data.errors import DataStop
from ..parallel.collective_check import compare
from ..parallel.process_group import is_first, join, leave, pick_device
from ..parallel.progress import check_before_collectives, in_phase
from .batch import Rows
from .checkpointing import SaveFailed, conclude, settled, started
from .config.complain import complain
from .config.config import Config
from .config.private_files import CannotWrite
from .evaluation import Evaluation, evaluate_session
from .exit import ExitCode, RunStop, say_failure, say_stop
from .fault_tolerance.dry_run import dry_step
from .fault_tolerance.recovery import attempt, recover
from .fault_tolerance.signals import listening
from .fault_tolerance.supervisor import Supervisor, build_supervisor
from .fault_tolerance.watchdog import watched
from .logging.expert_stats.collector import ExpertStats
from .logging.run_logger import NullLogger, Reporter, build_reporter, set_up_logging
from .logging.step_log import StepLog, Stopwatch
from .optimizer import learning_rate_factor
from .session import Session
from .setup import open_session
from .step import StepNumbers
from .step_flags import GlobalFlags

GRACE_SECONDS = 30.0
"""For which a process group waits longer than the watchdog, which knows more about why."""
SAID_ROWS = 10
"""Bad rows of a source that are said on the console; events.jsonl has all."""

log = logging.getLogger("tokenyard")


def run(config: Config) -> int:
    """Train to the end as one rank of the world in the environment. Returns the exit code."""
    device = pick_device(config.device.value)
    join(device, config.parallel.timeout_seconds + GRACE_SECONDS)
    torch.manual_seed(config.seed)
    set_up_logging(is_first())
    try:
        with listening():
            try:
                session = open_session(config, device)
            except CannotWrite:
                raise
            except ValueError as error:
                return refuse(error)
            except DataStop as stop:
                return refuse(stop, stop.exit_code)
            with closing(session), build_reporter(session) as reporter:
                return train_session(session, reporter)
    except CannotWrite as error:
        return refuse(error, ExitCode.dry_step)
    except SaveFailed as error:
        return refuse(error, ExitCode.failed_writer)
    except Exception as error:
        say_failure(error)
        raise
    finally:
        leave()


def train_session(session: Session, reporter: Reporter) -> int:
    """Train to the end, or to where the run has to end. Returns the exit code."""
    check_before_collectives(compare if session.config.debug.collectives else None)
    supervisor = build_supervisor(session, reporter)
    try:
        with watched(session, reporter.stalled, reporter.left_alone):
            dry_step(session, reporter)
            evaluation = train(session, reporter, supervisor)
    except (DataStop, RunStop) as stop:
        return end_early(stop, session, reporter, supervisor)
    reporter.finished(evaluation or validated(session, reporter))
    return 0


def train(session: Session, reporter: Reporter, supervisor: Supervisor) -> Evaluation | None:
    """All steps that are left, with a checkpoint and a validation after the last. None if no step was left.

    Raises, on all ranks, a DataStop or a RunStop if the run ends before.
    """
    config, evaluation = session.config, None
    session.parallel.model.train()
    stopwatch, expert_stats = Stopwatch(session.device), ExpertStats(session)
    reporter.started()
    while session.step < config.steps:
        due = due_after(session.step + 1, config, expert_stats)
        expert_stats.begin_step(due.log)
        numbers, lr = next_step(session, supervisor)
        reporter.catch_up()
        if not numbers:
            continue
        expert_stats.update(numbers)
        stopwatch.tokens += numbers.tokens
        intervals, tokens = stopwatch.take() if due.log else ([], 0)
        with stopwatch.paused():
            evaluation = validated(session, reporter) if due.validate else None
            if due.log:
                data_wait, data = session.feed.waited(), session.data.train.counts(session.step)
                snapshot = expert_stats.snapshot(numbers, validated=due.validate, saves=due.save)
                reporter.logged(
                    StepLog(session.step, numbers, lr, intervals, tokens, data_wait, data, evaluation, snapshot)
                )
            session.validated = {session.step: evaluation.loss} if evaluation else {}
            settle(session, reporter, numbers.global_flags)
            if due.save or numbers.global_flags.save:
                keep(session, reporter, supervisor, durable=numbers.global_flags.save > 0)
        supervisor.heard(numbers.global_flags)
    keep(session, reporter, supervisor, durable=True)
    return evaluation


def next_step(session: Session, supervisor: Supervisor) -> tuple[StepNumbers | None, float]:
    """One optimizer step and its learning rate; no numbers if it was skipped, jumped over or rolled back."""
    config = session.config
    lr = config.optimizer.lr * learning_rate_factor(config.schedule, session.step + 1, config.steps)
    rows = micro_batches(session, supervisor)
    if session.step + 1 in supervisor.guard.jumps:
        session.step += 1
        return None, lr
    numbers = attempt(session, supervisor, rows, lr)
    if not numbers.updated:
        recover(session, supervisor, numbers.global_flags)
        return None, lr
    supervisor.guard.took(numbers.global_flags)
    session.step += 1
    session.tokens += numbers.tokens
    return numbers, lr


def single_step(session: Session) -> StepNumbers:
    """One optimizer step outside of a run: for tests and benchmarks."""
    numbers, _ = next_step(session, build_supervisor(session, NullLogger()))
    assert numbers is not None
    return numbers


@in_phase("data")
def micro_batches(session: Session, supervisor: Supervisor) -> list[Rows]:
    """This rank's rows of the next global batch.

    Raises a DataStop, on all ranks, if there is none. What this rank alone cannot read is told to all in the step.
    """
    try:
        try:
            return session.feed.take(session.step)
        finally:
            tell_findings(session.data, session.step + 1, supervisor.reporter)
    except (OSError, ValueError) as error:
        supervisor.bad_data = f"{type(error).__name__}: {error}"
        return session.feed.nothing()


def tell_findings(data: DataPipeline, step: int, reporter: Reporter) -> None:
    """Rows and files that could not be read while the rows of `step` were: all of them as events, the first rows also in words."""
    for found in data.train.findings():
        reporter.event(found.kind, step=step, source=found.source, file=found.file, row=found.row, reason=found.reason)
        if found.kind == "file_failed":
            reporter.alert("file_failed", f"step {step}: {found}")
        elif found.number <= SAID_ROWS:
            log.warning("bad row, skipped: %s", found)


@in_phase("evaluation")
def validated(session: Session, reporter: Reporter) -> Evaluation:
    """A validation pass, as time that was not spent on training."""
    with reporter.spent("evaluation"):
        return evaluate_session(session)


@in_phase("save")
def keep(session: Session, reporter: Reporter, supervisor: Supervisor, durable: bool = False) -> None:
    """A checkpoint of this step, which goes on beside the training unless it must be `durable`. Collective.

    What is logged is told before: a run that goes on from here does not do it again.

    RunStop, and no checkpoint, if a number is not finite or copies differ; SaveFailed if the run needs the one that failed.
    """
    reporter.catch_up()
    with reporter.spent("checkpoint"):
        supervisor.replicas.compare()
        session.extra = supervisor.state()
        for outcome in conclude(session) if durable else started(session):
            reporter.saved(outcome)
    supervisor.saved()


def settle(session: Session, reporter: Reporter, global_flags: GlobalFlags) -> None:
    """After each step: what became of the save under way, by what the ranks told each other in the step. Collective if it ended."""
    for outcome in settled(session, global_flags.failed_writer > 0, global_flags.writing > 0):
        reporter.saved(outcome)


def end_early(stop: DataStop | RunStop, session: Session, reporter: Reporter, supervisor: Supervisor) -> int:
    """Before the last step, with a checkpoint if the state is sound. Returns the exit code."""
    code, why = say_stop(stop, session.step), str(stop)
    try:
        if not isinstance(stop, RunStop) or stop.saves:
            keep(session, reporter, supervisor, durable=True)
    except RunStop as unsound:  # weights that are not finite, or differ
        code, why = say_stop(unsound, session.step), f"{why}; {unsound}"
    else:
        if not isinstance(stop, RunStop):
            reporter.finished(validated(session, reporter), code)
            return code
    supervisor.stopped()
    reporter.stopped(why, code)
    return code


class Due(NamedTuple):
    """What follows a step."""

    validate: bool
    save: bool
    log: bool


def due_after(step: int, config: Config, expert_stats: ExpertStats) -> Due:
    """Known before the step is computed. Each comes every so many steps, and after the last."""

    def due(every: int | None) -> bool:
        return step == config.steps or (bool(every) and step % every == 0)

    validate, save = due(config.evaluate.every), due(config.checkpoint.every)
    return Due(validate, save, due(config.log.every) or validate or save or expert_stats.due(step))


def refuse(error: Exception, code: int = ExitCode.bad_configuration) -> int:
    """What could not be refused before the ranks had met; all ranks come to the same error. Returns the exit code."""
    return complain(error, code) if is_first() else code
