"""What people and trackers see of a run: journals, trackers and the console. Rank 0 alone has any of it."""

import logging
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from types import TracebackType
from typing import Any, final

from ...checkpoint.saver import Outcome
from ...moe.device import kind_of
from ...moe.param_count import count
from ...parallel.object_collectives import from_all
from ..config.config import Tier
from ..config.environment import local_world_size
from ..config.private_files import CannotWrite, writing_to
from ..config.redact import RedactingFormatter
from ..config.serialize import shown_config, write_config
from ..derive import DTYPES
from ..evaluation import Evaluation
from ..exit import ExitCode
from ..session import Session
from .console.startup import startup_lines
from .console.step_line import Eta, fitting_spans, layer_lines
from .console.summary import end_lines
from .console.text import Printer, Span
from .environment_info import environment, git_state
from .expert_stats.alerts import TITLES, Alerts
from .expert_stats.collector import describe, table_due
from .goodput import Accounting, in_words
from .journal import Journal
from .metrics import Meter
from .peak_flops import Peak, peak_flops
from .step_log import PendingLog, StepLog
from .summary_data import end_facts, startup_facts, train_command, validation_record
from .trackers.trackers import build_trackers, run_identity

TRACKER_SECONDS = 20.0
"""That the dry step gives trackers to start."""
LEAVING_SECONDS = 5.0
"""The same where another rank has failed."""
STALL_SECONDS = 20.0
"""That trackers have to end in a hang: torchrun kills what is still there 30 s after the first rank that ended."""


class Reporter(ABC):
    """Is told what happens. A context: the trackers hear how the run ended, whatever ended it."""

    def __enter__(self) -> "Reporter":
        return self

    @abstractmethod
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    @abstractmethod
    def logged(self, logged: StepLog) -> None:
        """A step to log; on a GPU it is told by the next `catch_up`."""

    def catch_up(self) -> None:  # noqa: B027
        """Tell what is still to be told. The host waits for nothing if the device has begun another step since."""

    @abstractmethod
    def saved(self, outcome: Outcome) -> None:
        """A checkpoint is durable, or its save has failed."""

    @abstractmethod
    def finished(self, evaluation: Evaluation, code: int = 0) -> None:
        """The last step is done, or the last that the data allow; its validation and the exit code."""

    def spent(self, kind: str) -> AbstractContextManager[None]:
        """What runs inside is no training but of this kind; see goodput.py."""
        return nullcontext()

    def started(self) -> None:  # noqa: B027
        """The first step begins."""

    def try_trackers(self) -> None:  # noqa: B027
        """Say which trackers do not start. Training goes on without them."""

    @abstractmethod
    def event(self, kind: str, /, **facts: Any) -> None:
        """Something happened that is worth a line of events.jsonl."""

    @abstractmethod
    def alert(self, kind: str, text: str) -> None:
        """Something that people want to be told at once; expert_stats/alerts.py has the titles of the kinds."""

    def stalled(self, text: str) -> None:  # noqa: B027
        """The ranks hang and the process is about to end. Called by the watchdog's thread."""

    def left_alone(self, code: int) -> None:  # noqa: B027
        """Another rank has failed, and the process is about to end with its code. Called by the watchdog's thread."""

    @abstractmethod
    def rolled_back(self, session: Session, step: int) -> None:
        """The run is back at an earlier step, because `step` could not be taken."""

    @abstractmethod
    def stopped(self, reason: str, code: int) -> None:
        """The run ends before its last step, with this exit code."""


def build_reporter(session: Session) -> Reporter:
    """For rank 0 the real one. The peak is measured on all ranks at once, as they will share the machine. Collective.

    CannotWrite, on all ranks, if its files cannot be made.
    """
    ranks = session.parallel.mesh.world
    peak = peak_flops(session.device, DTYPES[session.config.precision], ranks, local_world_size() or ranks)
    reporter, error = NullLogger(), None
    if session.parallel.mesh.rank == 0:
        try:
            with writing_to(session.folder):
                reporter = RunLogger(session, peak)
        except CannotWrite as lacking:
            error = lacking
    if error := from_all(error)[0]:
        raise error
    return reporter


@final
class NullLogger(Reporter):
    """Says nothing."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def logged(self, logged: StepLog) -> None:
        pass

    def saved(self, outcome: Outcome) -> None:
        pass

    def finished(self, evaluation: Evaluation, code: int = 0) -> None:
        pass

    def event(self, kind: str, /, **facts: Any) -> None:
        pass

    def alert(self, kind: str, text: str) -> None:
        pass

    def rolled_back(self, session: Session, step: int) -> None:
        pass

    def stopped(self, reason: str, code: int) -> None:
        pass


@final
class RunLogger(Reporter):
    def __init__(self, session: Session, peak: Peak) -> None:
        config, folder = session.config, session.folder
        self.session = session
        self.begin = perf_counter()
        self.printer = Printer()
        self.accounting = Accounting(folder, session.step)
        self.metrics = Journal(folder / "metrics.jsonl", keep_to_step=session.step)
        self.telemetry = Journal(folder / "telemetry.jsonl", keep_to_step=session.step)
        self.events = Journal(folder / "events.jsonl")
        self.alerts = Alerts(config.model.moe.top_k)
        self.meter = Meter(config.model, config.sequence_length, peak.flops, session.tokens)
        self.eta = Eta(config.steps)
        self.late: PendingLog | None = None
        self.waits_for_next = kind_of(session.device) == "cuda"
        """Whether a step is told after the next one, when its numbers have come to the host."""
        self.summary: dict[str, Any] = {}
        self.code = 0
        resumed = session.step > 0
        self.trackers = build_trackers(
            config.tracker, folder, run_identity(folder, resumed), config.run.name, self.printer.say, self.events
        )
        write_config(config, folder / "config.yaml")
        self.trackers.start({"config": shown_config(config), "layout": session.parallel.mesh.sizes, **git_state()})
        here = environment(session.device, session.parallel.mesh.world)
        self.events.event("resume" if resumed else "start", step=session.step, **session.parallel.mesh.sizes, environment=here)
        self.printer.lines(startup_lines(config, count(config.model), startup_facts(session, peak)))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.catch_up()
        except RuntimeError as lost:  # of a device that has failed
            self.printer.say(f"the last logged step is lost: {lost}")
        if error is not None:
            self.events.event("failed", step=self.session.step, error=f"{type(error).__name__}: {error}")
            again = train_command(self.session.config, self.session.device, self.session.folder)
            self.printer.say(f"stopped after step {self.session.step} by {type(error).__name__}; to go on: {again}")
        self.events.event("accounting", step=self.session.step, **self.accounting.facts())
        self.printer.say(in_words(self.accounting.facts()))
        self.trackers.finish(self.code if error is None else 1, self.summary)
        self.metrics.close()
        self.telemetry.close()
        self.events.close()

    def logged(self, logged: StepLog) -> None:
        self.catch_up()
        self.late = PendingLog(logged)
        if not self.waits_for_next:
            self.catch_up()

    def catch_up(self) -> None:
        late, self.late = self.late, None
        if late is not None:
            self.tell(late.get())

    def tell(self, logged: StepLog) -> None:
        """Writes a logged step, all of it on the host, to the files, the trackers and the console."""
        config, step, seconds = self.session.config, logged.step, logged.seconds()
        record = self.meter.record(step, logged.numbers, logged.lr, logged.tokens, seconds)
        record |= {"data_wait_fraction": logged.data_wait / seconds, **logged.data}
        telemetry = None
        if logged.snapshot is not None:
            metrics, telemetry = describe(logged.numbers, logged.snapshot, config, self.session.parallel.mesh.world)
            record |= metrics
        if logged.evaluation is not None:
            record |= validation_record(config, logged.evaluation)
        self.accounting.waited(logged.data_wait)
        self.metrics.write(record)
        self.trackers.log(record)
        self.printer.line(fitting_spans(record, config.steps, self.eta.after(step), self.printer.width))
        if logged.evaluation is not None:
            loss, tokens, _ = logged.evaluation
            self.printer.say(f"step {step}: validation loss {loss:.4f} over {tokens:,} tokens")
        if telemetry is not None:
            self.watched(telemetry, logged.evaluation is not None)

    def watched(self, record: dict[str, Any], validated: bool) -> None:
        """A record of telemetry.jsonl: the file, trackers, the table of the layers, alarms."""
        config, step = self.session.config, record["step"]
        self.telemetry.write(record)
        if validated or config.telemetry.tier is Tier.detailed:
            self.trackers.telemetry(record)
        if table_due(config, step):
            self.printer.lines(layer_lines(record, self.printer.bars))
        for kind, text in self.alerts.heard(record):
            self.alert_at(step, kind, text)

    def alert(self, kind: str, text: str) -> None:
        self.alert_at(self.session.step, kind, text)

    def alert_at(self, step: int, kind: str, text: str) -> None:
        """Of a step that may be an earlier one."""
        self.events.event("alert", step=step, alert=kind, text=text)
        placed = text if text.startswith("step ") else f"step {step}: {text}"
        self.printer.line([Span(f"{TITLES.get(kind, kind)}: {placed}", "bold red")])
        self.trackers.alert(kind, TITLES.get(kind, kind), placed)

    def saved(self, outcome: Outcome) -> None:
        if outcome.error is None:
            self.events.event("checkpoint", **outcome.facts(), told_step=self.session.step)
            self.look_ahead(outcome)
        else:
            self.events.event("checkpoint_failed", **outcome.facts(), told_step=self.session.step)
            self.alert("checkpoint_failed", f"step {outcome.step}: checkpoint {outcome.path} was NOT written: {outcome.error}")
        self.events.event("accounting", step=self.session.step, **self.accounting.facts())

    def look_ahead(self, outcome: Outcome) -> None:
        """Is there room for the next checkpoint, an interval before it is due?"""
        lacking = self.session.saver.lacking_for(outcome.bytes) if self.session.step < self.session.config.steps else None
        if lacking:
            self.alert("disk", f"the next checkpoint will not be written unless room is made: {lacking}")

    def spent(self, kind: str) -> AbstractContextManager[None]:
        return self.accounting.of(kind)

    def started(self) -> None:
        self.accounting.started()

    def try_trackers(self) -> None:
        late = self.trackers.ready(TRACKER_SECONDS)
        if late:
            self.alert("trackers", f"not started within {TRACKER_SECONDS:g} s: {', '.join(late)}; metrics.jsonl has all records")

    def finished(self, evaluation: Evaluation, code: int = 0) -> None:
        self.catch_up()
        session, self.code = self.session, code
        self.summary = validation_record(session.config, evaluation)
        self.events.event("finished", step=session.step, seconds=perf_counter() - self.begin, **self.summary)
        with self.spent("evaluation"):
            facts = end_facts(session, evaluation, perf_counter() - self.begin)
        if facts.sample is not None:
            self.trackers.sample(session.step, *facts.sample)
        self.printer.lines(end_lines(facts, self.printer.bars))

    def event(self, kind: str, /, **facts: Any) -> None:
        self.events.event(kind, **facts)

    def stalled(self, text: str) -> None:
        if self.late is not None and self.late.done():
            self.catch_up()
        self.alert("stall", text)
        self.trackers.finish(int(ExitCode.hang), self.summary, STALL_SECONDS)

    def left_alone(self, code: int) -> None:
        self.trackers.finish(code, self.summary, LEAVING_SECONDS)

    def rolled_back(self, session: Session, step: int) -> None:
        self.catch_up()
        self.metrics.close()
        self.telemetry.close()
        self.metrics = Journal(session.folder / "metrics.jsonl", keep_to_step=session.step)
        self.telemetry = Journal(session.folder / "telemetry.jsonl", keep_to_step=session.step)
        self.meter.tokens = session.tokens
        self.events.event("rolled_back", step=session.step, around=step)

    def stopped(self, reason: str, code: int) -> None:
        self.catch_up()
        session, self.code = self.session, code
        self.events.event("stopped", step=session.step, reason=reason, code=code, checkpoint=str(session.checkpoint))
        self.printer.say(f"to go on: {train_command(session.config, session.device, session.folder)}")


def set_up_logging(first: bool) -> None:
    """Lines of the package's own logger on standard error, from rank 0 alone."""
    log = logging.getLogger("tokenyard")
    log.setLevel(logging.INFO if first else logging.ERROR)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(RedactingFormatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
