"""Writes what happens in a run to its journals, the trackers and the console. Only rank 0 does."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from types import TracebackType
from typing import Any, final

import torch

from ...checkpoint.saver import Outcome
from ...moe.device import kind_of
from ...moe.param_count import count
from ...parallel.object_collectives import from_all
from ...plan.own_layout import plan_own_layout
from ..config.config import Tier
from ..config.environment import local_world_size
from ..config.own_files import CannotWrite, writing_to
from ..config.redact import RedactingFormatter
from ..config.serialize import shown_config, write_config
from ..derive import DTYPES
from ..evaluation import Evaluation
from ..exit import ExitCode
from ..session import Session
from .console.startup import startup_lines
from .console.step_line import Eta, fitting_spans, layer_lines
from .console.summary import Sample, end_lines, evaluation_lines, sample_lines
from .console.text import Printer, Span
from .environment_info import environment, git_state
from .expert_stats.alerts import TITLES, Alerts
from .expert_stats.collector import snapshot_records
from .goodput import Goodput, in_words
from .journal import Journal
from .metrics import Meter
from .peak_flops import Peak, peak_flops
from .plan_check import PlanCheck, compare
from .rank_stats import rank_metrics
from .step_log import PendingLog, StepLog
from .summary_data import end_facts, resume_command, startup_facts, validation_record
from .trackers.trackers import build_trackers, run_identity

START_SECONDS = 20.0
"""How long the dry step waits for the trackers to start."""
FAILURE_SECONDS = 5.0
"""How long the trackers may take to finish after another rank has failed."""
HANG_SECONDS = 20.0
"""How long the trackers may take to finish in a hang: torchrun kills what is left 30 s after the first rank that ended."""


class RunLogger:
    """The interface of all loggers; here each method does nothing. A context manager, so that trackers always finish."""

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes files and trackers, with an event if an error ended the run."""

    def begin_training(self) -> None:
        """Marks the end of start-up: the first step begins."""

    def timed_step(self) -> AbstractContextManager[None]:
        """Follows the step inside, to compare the first ones with the plan of the run's layout."""
        return nullcontext()

    def log_step(self, logged: StepLog) -> None:
        """Logs a step; on a GPU it is written by the next `flush`."""

    def flush(self) -> None:
        """Writes the pending step. The host does not wait if the device has finished another step since."""

    def log_sample(self, prompt: str, text: str) -> None:
        """Logs what the model wrote after a prompt at this step."""

    def log_event(self, kind: str, /, **facts: Any) -> None:
        """Writes a line to events.jsonl."""

    def alert(self, kind: str, text: str, step: int | None = None) -> None:
        """Notifies people at once, by default about the current step; expert_stats/alerts.py has the titles of the kinds."""

    def log_checkpoint(self, outcome: Outcome) -> None:
        """Logs a checkpoint that is durable, or a save that failed."""

    def timed(self, kind: str) -> AbstractContextManager[None]:
        """Accounts the time inside to `kind` instead of training; see goodput.py."""
        return nullcontext()

    def wait_for_trackers(self) -> None:
        """Alerts if a tracker does not start. Training continues without it."""

    def log_rollback(self, step: int) -> None:
        """Cuts the journals back to the session's step, because `step` could not be taken."""

    def log_stop(self, reason: str, code: int) -> None:
        """Logs that the run ends before its last step, with this exit code."""

    def log_end(self, evaluation: Evaluation, make_sample: Callable[[], Sample | None], code: int = 0) -> None:
        """Logs the end of the run: the last validation, a sample of the model, and the exit code."""

    def on_hang(self, text: str) -> None:
        """Finishes the trackers when the ranks hang and the process is about to end. Called by the watchdog's thread."""

    def on_rank_failure(self, code: int) -> None:
        """Finishes the trackers when another rank has failed and the process is about to end. Called by the watchdog's thread."""


@final
class NullLogger(RunLogger):
    """Logs nothing: for all ranks but the first."""


def build_run_logger(session: Session) -> RunLogger:
    """Returns the logger of this rank. Measures the peak on all ranks at once, because they share the machine. Collective.

    Raises CannotWrite, on all ranks, if rank 0 cannot create its files.
    """
    ranks = session.parallel.mesh.world
    peak = peak_flops(session.device, DTYPES[session.config.precision], ranks, local_world_size() or ranks)
    run_logger, error = NullLogger(), None
    if session.parallel.mesh.rank == 0:
        try:
            with writing_to(session.folder):
                run_logger = RankZeroLogger(session, peak)
        except CannotWrite as refusal:
            error = refusal
    if error := from_all(error)[0]:
        raise error
    return run_logger


@final
class RankZeroLogger(RunLogger):
    """Writes metrics.jsonl, telemetry.jsonl and events.jsonl, feeds the trackers and prints to the console."""

    def __init__(self, session: Session, peak: Peak) -> None:
        config, folder = session.config, session.folder
        self.session = session
        self.begin = perf_counter()
        self.printer = Printer()
        self.goodput = Goodput(folder, session.step)
        self.metrics = Journal(folder / "metrics.jsonl", keep_to_step=session.step)
        self.telemetry = Journal(folder / "telemetry.jsonl", keep_to_step=session.step)
        self.events = Journal(folder / "events.jsonl")
        self.alerts = Alerts(config.model.moe.top_k)
        self.meter = Meter(config.model, config.sequence_length, peak.flops, session.tokens)
        self.eta = Eta(config.steps, config.batch.sizes(config.sequence_length).before)
        self.pending: PendingLog | None = None
        self.defers = kind_of(session.device) == "cuda"
        """Whether a step is written after the next one, when its numbers are on the host."""
        self.plan_check: PlanCheck | None = None
        """Until the first steps are compared with the plan; None on a CPU, for which nothing is planned that could be compared."""
        self.summary: dict[str, Any] = {}
        self.code = 0
        resumed = session.step > 0
        identity = run_identity(folder, resumed)
        self.trackers = build_trackers(config.tracker, folder, identity, config.run.name, self.printer.say, self.events)
        write_config(config, folder / "config.yaml")
        self.trackers.start({"config": shown_config(config), "layout": session.parallel.mesh.sizes, **git_state()})
        self.printer.copy, self.log_copy = self.trackers.console, LogCopy(self.trackers.console)
        logging.getLogger("tokenyard").addHandler(self.log_copy)
        here = environment(session.device, session.parallel.mesh.world)
        self.log_event("resume" if resumed else "start", step=session.step, **session.parallel.mesh.sizes, environment=here)
        world = session.parallel.mesh.world
        name = torch.cuda.get_device_name(session.device) if self.defers else None
        self.planned = plan_own_layout(config, world, local_world_size() or world, name)
        if self.defers:
            self.log_event("planned", step=session.step, **self.planned.record())
        self.printer.lines(startup_lines(config, count(config.model), startup_facts(session, peak), self.planned.sentences()))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        step = self.session.step
        try:
            self.flush()
        except RuntimeError as lost:  # the device has failed
            self.printer.say(f"the last logged step is lost: {lost}")
        if error is not None:
            self.log_event("failed", step=step, error=f"{type(error).__name__}: {error}")
            again = resume_command(self.session.folder)
            self.printer.say(f"stopped after step {step} by {type(error).__name__}; to go on: {again}")
        self.log_event("accounting", step=step, **self.goodput.facts())
        self.printer.say(in_words(self.goodput.facts()))
        logging.getLogger("tokenyard").removeHandler(self.log_copy)
        self.trackers.finish(self.code if error is None else 1, self.summary)
        for journal in (self.metrics, self.telemetry, self.events):
            journal.close()

    def begin_training(self) -> None:
        self.goodput.begin_training()
        if self.defers:
            self.plan_check = PlanCheck(self.session.device)

    def timed_step(self) -> AbstractContextManager[None]:
        return nullcontext() if self.plan_check is None else self.plan_check.step()

    def log_step(self, logged: StepLog) -> None:
        self.flush()
        self.pending = PendingLog(logged)
        if not self.defers:
            self.flush()

    def flush(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            self.write_step(pending.get())
        if self.plan_check is not None and (measured := self.plan_check.measured()) is not None:
            self.plan_check = None
            record = compare(self.planned, measured, self.session.config)
            self.log_event("plan_checked", step=self.session.step, **record)
            self.printer.say(record["text"])
            for text in record["off"]:
                self.printer.line([Span(text, "yellow")])

    def write_step(self, logged: StepLog) -> None:
        """Writes a logged step, whose tensors are on the host, to the journals, the trackers and the console."""
        config, step, evaluation, seconds = self.session.config, logged.step, logged.evaluation, logged.seconds()
        record = self.meter.record(step, logged.numbers, logged.lr, logged.tokens, seconds)
        record |= {"data_wait_fraction": logged.data_wait / seconds, **logged.counters}
        record |= rank_metrics(logged.ranks_2K, self.session.parallel.mesh.world, self.session.device.type == "cuda", seconds)
        telemetry = None
        if logged.snapshot is not None:
            metrics, telemetry = snapshot_records(logged.numbers, logged.snapshot, config, self.session.parallel.mesh.stage.size)
            record |= metrics
        if evaluation is not None:
            record |= validation_record(config, evaluation)
        self.goodput.add("data", logged.data_wait)
        self.metrics.write(record)
        self.trackers.log(record)
        self.printer.line(fitting_spans(record, config.steps, self.eta.after(step), self.printer.width))
        if evaluation is not None:
            for line in evaluation_lines(evaluation):
                self.printer.say(f"step {step}: {line}")
        if telemetry is not None:
            self.write_telemetry(telemetry, evaluation is not None)

    def write_telemetry(self, record: dict[str, Any], validated: bool) -> None:
        """Writes a record of telemetry.jsonl, shows it in the trackers and in the table of layers, and raises alerts."""
        config, step = self.session.config, record["step"]
        self.telemetry.write(record)
        if validated or config.telemetry.tier is Tier.detailed:
            self.trackers.telemetry(record)
        if validated and step < config.steps:  # the summary at the end has a table of its own
            self.printer.lines(layer_lines(record, self.printer.bars))
        for kind, text in self.alerts.check(record):
            self.alert(kind, text, step)

    def log_sample(self, prompt: str, text: str) -> None:
        step = self.session.step
        self.flush()
        self.log_event("sample", step=step, prompt=prompt, text=text)
        self.trackers.sample(step, prompt, text)
        self.printer.lines([[Span(f"  sample at step {step}", "bold")], *sample_lines(prompt, text)])

    def log_event(self, kind: str, /, **facts: Any) -> None:
        self.events.event(kind, **facts)

    def alert(self, kind: str, text: str, step: int | None = None) -> None:
        step = self.session.step if step is None else step
        self.log_event("alert", step=step, alert=kind, text=text)
        placed = text if text.startswith("step ") else f"step {step}: {text}"
        self.printer.line([Span(f"{TITLES.get(kind, kind)}: {placed}", "bold red")])
        self.trackers.alert(kind, placed)

    def log_checkpoint(self, outcome: Outcome) -> None:
        session = self.session
        if outcome.error is None:
            self.log_event("checkpoint", **outcome.facts(), told_step=session.step)
            lacking = session.saver.space_error_for(outcome.bytes) if session.step < session.config.steps else None
            if lacking:  # found an interval before the next checkpoint is due
                self.alert("disk", f"the next checkpoint will not be written unless room is made: {lacking}")
        else:
            self.log_event("checkpoint_failed", **outcome.facts(), told_step=session.step)
            self.alert("checkpoint_failed", f"step {outcome.step}: checkpoint {outcome.path} was NOT written: {outcome.error}")
        self.log_event("accounting", step=session.step, **self.goodput.facts())

    def timed(self, kind: str) -> AbstractContextManager[None]:
        return self.goodput.timed(kind)

    def wait_for_trackers(self) -> None:
        missing = self.trackers.wait_for_start(START_SECONDS)
        if missing:
            self.alert("trackers", f"not started within {START_SECONDS:g} s: {', '.join(missing)}; metrics.jsonl has all records")

    def log_rollback(self, step: int) -> None:
        session = self.session
        self.flush()
        self.metrics.close()
        self.telemetry.close()
        self.metrics = Journal(session.folder / "metrics.jsonl", keep_to_step=session.step)
        self.telemetry = Journal(session.folder / "telemetry.jsonl", keep_to_step=session.step)
        self.meter.tokens = session.tokens
        self.log_event("rolled_back", step=session.step, around=step)

    def log_stop(self, reason: str, code: int) -> None:
        self.flush()
        session, self.code = self.session, code
        self.log_event("stopped", step=session.step, reason=reason, code=code, checkpoint=str(session.checkpoint))
        self.printer.say(f"to go on: {resume_command(session.folder)}")

    def log_end(self, evaluation: Evaluation, make_sample: Callable[[], Sample | None], code: int = 0) -> None:
        self.flush()
        session, self.code = self.session, code
        self.summary = validation_record(session.config, evaluation)
        self.log_event("finished", step=session.step, seconds=perf_counter() - self.begin, **self.summary)
        seconds = perf_counter() - self.begin
        with self.timed("evaluation"):
            sample = make_sample()
        if sample is not None:
            self.log_event("sample", step=session.step, prompt=sample[0], text=sample[1])
            self.trackers.sample(session.step, *sample)
        self.printer.lines(end_lines(end_facts(session, evaluation, sample, seconds, code), self.printer.bars))

    def on_hang(self, text: str) -> None:
        if self.pending is not None and self.pending.done():
            self.flush()
        self.alert("stall", text)
        self.trackers.finish(int(ExitCode.hang), self.summary, HANG_SECONDS)

    def on_rank_failure(self, code: int) -> None:
        self.trackers.finish(code, self.summary, FAILURE_SECONDS)


@final
class LogCopy(logging.Handler):
    """Gives each line of the package's log to `take` too."""

    def __init__(self, take: Callable[[str], None]) -> None:
        super().__init__()
        self.take = take
        self.setFormatter(RedactingFormatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.take(self.format(record))


def set_up_logging(first: bool) -> None:
    """Sends the package's log lines to standard error, from rank 0 alone."""
    log = logging.getLogger("tokenyard")
    log.setLevel(logging.INFO if first else logging.ERROR)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(RedactingFormatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
