"""A training run: step, log, evaluate, checkpoint, stop."""

import logging
import os
from contextlib import closing
from typing import NamedTuple

import torch

from ..data.build import DataPipeline
from ..data.errors import DataStop
from ..parallel.collective_check import compare
from ..parallel.meeting import CannotMeet
from ..parallel.process_group import is_first, join, leave, pick_device
from ..parallel.progress import check_before_collectives, in_phase
from .batch import Rows
from .busy_cores import warn_of_busy_cores
from .checkpointing import SaveFailed, poll_save, save_and_wait, start_save
from .config.complain import BAD_USAGE, complain, say
from .config.config import Config
from .config.environment import launch_id
from .config.own_files import CannotWrite
from .downstream.judge import judge, scorer_of
from .downstream.samples import write_samples
from .evaluation import Evaluation
from .exit import ExitCode, RunStop, report_failure, report_stop
from .fault_tolerance.dry_step import dry_step
from .fault_tolerance.recovery import recover, run_step
from .fault_tolerance.signals import handling_signals
from .fault_tolerance.supervisor import Supervisor, build_supervisor
from .fault_tolerance.watchdog import hang_guard
from .learning_rate import learning_rate_factor
from .load import sample_of
from .local_saves import save_locally
from .logging.expert_stats.collector import ExpertStats
from .logging.rank_stats import RankStats
from .logging.run_logger import NullLogger, RunLogger, build_run_logger, set_up_logging
from .logging.step_log import StepLog, Stopwatch, Waits
from .logging.step_profiler import StepProfiler
from .session import Session
from .setup import open_session
from .step import StepNumbers

GRACE_SECONDS = 30.0
"""How much longer than the watchdog a process group waits: the watchdog knows more about the cause."""
PRINTED_ROWS = 10
"""Bad rows of a source that are printed; events.jsonl has all."""

log = logging.getLogger("tokenyard")


def run(config: Config) -> int:
    """Trains to the end as one rank of the world in the environment. Returns the exit code."""
    try:
        device = pick_device(config.device.value)
    except ValueError as error:  # on each rank, or on those for which there are too few GPUs
        first = os.environ.get("LOCAL_RANK", "0") in ("0", str(torch.cuda.device_count()))
        return complain(error) if first else BAD_USAGE
    limit = config.parallel.timeout_seconds
    try:
        join(device, limit + GRACE_SECONDS, launch_id(), say, limit)
    except CannotMeet as error:  # once for a host
        return complain(error, ExitCode.dry_step) if os.environ.get("LOCAL_RANK", "0") == "0" else ExitCode.dry_step
    torch.manual_seed(config.seed)
    set_up_logging(is_first())
    try:
        with handling_signals():
            try:
                session = open_session(config, device)
            except CannotWrite:
                raise
            except ValueError as error:
                return complain_once(error)
            except DataStop as stop:
                return complain_once(stop, stop.exit_code)
            with closing(session), build_run_logger(session) as run_logger:
                return train_session(session, run_logger)
    except CannotWrite as error:
        return complain_once(error, ExitCode.dry_step)
    except SaveFailed as error:
        return complain_once(error, ExitCode.failed_writer)
    except Exception as error:
        report_failure(error)
        raise
    finally:
        leave()


def train_session(session: Session, run_logger: RunLogger) -> int:
    """Trains to the last step, or to where the run has to end. Returns the exit code."""
    check_before_collectives(compare if session.config.debug.collectives else None)
    if is_first():
        warn_of_busy_cores(session.device)
    supervisor = build_supervisor(session, run_logger)
    try:
        with hang_guard(session, run_logger.on_hang, run_logger.on_rank_failure):
            dry_step(session, run_logger)
            with StepProfiler(session) as profiler:
                evaluation = train(session, run_logger, supervisor, profiler)
    except (DataStop, RunStop) as stop:
        return end_early(stop, session, run_logger, supervisor)
    run_logger.log_end(evaluation or validate(session, run_logger), lambda: sample_of(session))
    return 0


def train(session: Session, run_logger: RunLogger, supervisor: Supervisor, profiler: StepProfiler) -> Evaluation | None:
    """Runs the remaining steps, then saves. Returns the validation after the last step, None if no step remained.

    Raises, on all ranks, a DataStop or a RunStop if the run ends early.
    """
    config, evaluation = session.config, None
    session.parallel.model.train()
    stopwatch, expert_stats, rank_stats = Stopwatch(session.device), ExpertStats(session), RankStats(session)
    run_logger.begin_training()
    while session.step < config.steps:
        due = due_after(session.step + 1, config, expert_stats)
        expert_stats.begin_step(due.log)
        with run_logger.timed_step(), profiler.step(session.step + 1):
            numbers, lr = next_step(session, supervisor)
        run_logger.flush()
        if numbers is None:
            continue
        expert_stats.update(numbers)
        stopwatch.tokens += numbers.tokens
        intervals, tokens, waits = stopwatch.take() if due.log else ([], 0, Waits(0.0, 0.0))
        with stopwatch.paused():
            evaluation = validate(session, run_logger, due.tasks) if due.validate or due.tasks else None
            if due.log:
                data_wait, counters = session.batch_loader.waited(), session.data.train.metrics(session.step)
                snapshot = expert_stats.snapshot(numbers, due.validate, due.save)
                timing, ranks_2K = (intervals, tokens, data_wait), rank_stats.over_ranks(waits)
                run_logger.log_step(StepLog(session.step, numbers, lr, *timing, counters, evaluation, snapshot, ranks_2K))
            if due.sample:
                sample(session, run_logger)
            session.validation_loss = {session.step: evaluation.loss} if evaluation else {}
            flags = numbers.global_flags
            profiler.after_step(session.step, flags.snapshot > 0)
            if flags.snapshot:
                supervisor.remove_request("snapshot")
            for outcome in poll_save(session, flags.failed_writer > 0, flags.writing > 0):
                run_logger.log_checkpoint(outcome)
            if due.save or flags.save:
                save_checkpoint(session, run_logger, supervisor, durable=flags.save > 0)
            if due.save_locally and session.step < config.steps:
                save_to_host(session, run_logger, supervisor)
        supervisor.handle_flags(flags)
    save_checkpoint(session, run_logger, supervisor, durable=True)
    if session.local is not None:
        session.local.remove()
    return evaluation


def next_step(session: Session, supervisor: Supervisor) -> tuple[StepNumbers | None, float]:
    """Runs one optimizer step. Returns its numbers, None if it was skipped, jumped over or rolled back; and the learning rate."""
    config = session.config
    lr = config.optimizer.lr * learning_rate_factor(config, session.step + 1)
    rows = micro_batches(session, supervisor)
    if session.step + 1 in supervisor.guard.jumps:
        session.step += 1
        return None, lr
    numbers = run_step(session, supervisor, rows, lr)
    if not numbers.updated:
        recover(session, supervisor, numbers.global_flags)
        return None, lr
    supervisor.guard.record(numbers.global_flags)
    session.step += 1
    session.tokens += numbers.tokens
    return numbers, lr


def single_step(session: Session) -> StepNumbers:
    """Runs one optimizer step outside of a run: for tests and benchmarks."""
    numbers, _ = next_step(session, build_supervisor(session, NullLogger()))
    assert numbers is not None
    return numbers


@in_phase("data")
def micro_batches(session: Session, supervisor: Supervisor) -> list[Rows]:
    """Returns this rank's rows of the next global batch.

    Raises a DataStop, on all ranks, if there is none. If this rank alone cannot read its rows, the step's flags tell the others.
    """
    try:
        try:
            return session.batch_loader.take(session.step)
        finally:
            log_read_failures(session.data, session.step + 1, supervisor.run_logger)
    except (OSError, ValueError) as error:
        supervisor.bad_data = f"{type(error).__name__}: {error}"
        return session.batch_loader.empty(session.step)


def log_read_failures(data: DataPipeline, step: int, run_logger: RunLogger) -> None:
    """Logs rows and files that could not be read for `step`: all of them as events, the first rows also on the console."""
    for found in data.train.read_failures():
        run_logger.log_event(found.kind, step=step, source=found.source, file=found.file, row=found.row, reason=found.reason)
        if found.kind == "file_failed":
            run_logger.alert("file_failed", f"step {step}: {found}")
        elif found.number <= PRINTED_ROWS:
            log.warning("bad row, skipped: %s", found)


@in_phase("evaluation")
def validate(session: Session, run_logger: RunLogger, tasks: bool = True) -> Evaluation:
    """Runs a validation pass, whose time does not count as training. Collective."""
    with run_logger.timed("evaluation"):
        return judge(session, tasks)


@in_phase("evaluation")
def sample(session: Session, run_logger: RunLogger) -> None:
    """Continues the prompts of `sample` with the weights of this step. Collective."""
    with run_logger.timed("evaluation"):
        for prompt, text in write_samples(session, scorer_of(session)):
            run_logger.log_sample(prompt, text)


@in_phase("save")
def save_checkpoint(session: Session, run_logger: RunLogger, supervisor: Supervisor, durable: bool = False) -> None:
    """Starts a checkpoint of this step, and waits for it if it must be `durable`. Collective.

    Logged steps are written first, because a run that resumes from here does not log them again.

    Raises RunStop, without a checkpoint, if a number is not finite or replicas differ. Raises SaveFailed if it failed and the run
    needs it.
    """
    run_logger.flush()
    with run_logger.timed("checkpoint"):
        supervisor.replicas.compare()
        session.extra = {"guard": supervisor.guard.state()}
        for outcome in save_and_wait(session) if durable else start_save(session):
            run_logger.log_checkpoint(outcome)
    supervisor.grant_save()


@in_phase("local save")
def save_to_host(session: Session, run_logger: RunLogger, supervisor: Supervisor) -> None:
    """Starts a save of this step to the host's folder, and logs how the one before ended; a failure ends no run. Collective."""
    with run_logger.timed("checkpoint"):
        session.extra = {"guard": supervisor.guard.state()}
        outcome = save_locally(session)
    if outcome is not None:
        run_logger.log_event("local_checkpoint" if outcome.error is None else "local_failed", **outcome._asdict())
        if outcome.error is not None:
            run_logger.alert("local_failed", f"step {outcome.step}: the save to the hosts was NOT written: {outcome.error}")


def end_early(stop: DataStop | RunStop, session: Session, run_logger: RunLogger, supervisor: Supervisor) -> int:
    """Ends before the last step, with a checkpoint if the state is sound. Returns the exit code."""
    code, why = report_stop(stop, session.step), str(stop)
    try:
        if not isinstance(stop, RunStop) or stop.saves:
            save_checkpoint(session, run_logger, supervisor, durable=True)
            if session.local is not None:
                session.local.remove()
    except RunStop as unsound:  # weights that are not finite, or replicas that differ
        code, why = report_stop(unsound, session.step), f"{why}; {unsound}"
    else:
        if not isinstance(stop, RunStop):
            run_logger.log_end(validate(session, run_logger), lambda: sample_of(session), code)
            return code
    supervisor.remove_request("stop")
    run_logger.log_stop(why, code)
    return code


class Due(NamedTuple):
    """Which of these follow a step."""

    validate: bool
    save: bool
    save_locally: bool
    log: bool
    tasks: bool
    sample: bool


def due_after(step: int, config: Config, expert_stats: ExpertStats) -> Due:
    """Returns what follows `step`, known before it is computed: each comes at its own interval and after the last step."""

    def due(every: int | None) -> bool:
        return step == config.steps or (bool(every) and step % every == 0)

    validates, saves = due(config.evaluate.every), due(config.checkpoint.every)
    local = config.checkpoint.local
    locally = local.folder is not None and step % local.every == 0
    every = config.evaluate.tasks_every
    tasks = bool(config.evaluate.tasks) and (validates if every is None else due(every))
    logs = due(config.log.every) or validates or saves or tasks or expert_stats.due(step)
    return Due(validates, saves, locally, logs, tasks, bool(config.sample.every) and step % config.sample.every == 0)


def complain_once(error: Exception, code: int = ExitCode.bad_configuration) -> int:
    """Prints an error that all ranks have found, on the first of them. Returns the exit code."""
    return complain(error, code) if is_first() else code
