"""Compares the plan of a run's own layout with its first steps on a GPU: memory, and seconds of a step."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ...parallel.streams import record_event, seconds_between
from ...plan.own_layout import OwnPlan
from ..config.config import Config
from ..config.number_format import gigabytes
from .step_log import Interval

STEPS = 20
"""Steps after which the run is compared with its plan."""
FIRST = 5
"""Steps of these whose time does not count: caches fill, kernels are chosen and compiled."""
OFF = 0.15
"""An estimate that differs by a larger share of what was measured is named."""


class MeasuredSteps(NamedTuple):
    """Of rank 0."""

    allocated: int
    """The most bytes of tensors."""
    reserved: int
    """The most bytes that torch's allocator had."""
    seconds: float
    """The median step of those after FIRST."""


class PlanCheck:
    """Follows the first STEPS steps of this rank. The host never waits: `measured` answers once the device is done with them."""

    def __init__(self, device: torch.device) -> None:
        """Must come after RankStats, which begins to count the peak of memory."""
        self.device = device
        self.intervals: list[Interval] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Follows the step inside, without validation and checkpoints."""
        if len(self.intervals) == STEPS:
            yield
            return
        begin = record_event(self.device, timed=True)
        yield
        self.intervals.append((begin, record_event(self.device, timed=True)))

    def measured(self) -> MeasuredSteps | None:
        """Returns what was measured; None until the device is done."""
        if len(self.intervals) < STEPS or not self.intervals[-1][1].done():
            return None
        seconds = statistics.median(seconds_between(*each) for each in self.intervals[FIRST:])
        allocated, reserved = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        return MeasuredSteps(allocated, reserved, seconds)


def compare(planned: OwnPlan, measured: MeasuredSteps, config: Config) -> dict[str, Any]:
    """Returns the facts of the event `plan_checked`.

    `text` shows what was planned beside what was measured; `off` has a sentence for each estimate that differs by more than OFF.
    """
    record: dict[str, Any] = {
        "allocated_bytes": measured.allocated,
        "reserved_bytes": measured.reserved,
        "measured_step_seconds": measured.seconds,
    }
    off = list[str]()
    if planned.memory is not None:
        record |= {"planned_bytes": planned.memory, "memory_error": planned.memory / measured.allocated - 1}
        if abs(record["memory_error"]) > OFF:
            both = f"{gigabytes(planned.memory)} planned, {gigabytes(measured.allocated)} measured"
            off.append(f"memory {_by(record['memory_error'])}: {both}; {_memory_cause(record['memory_error'], config)}")
    if planned.time is not None:
        time = planned.time
        record |= {"planned_step_seconds": time.likely, "planned_step_seconds_range": [time.low, time.high]}
        record["step_seconds_error"] = time.likely / measured.seconds - 1
        if abs(record["step_seconds_error"]) > OFF:
            within = "within" if time.low <= measured.seconds <= time.high else "outside of"
            both = f"{time.likely:.3g} s planned, {measured.seconds:.3g} s measured, {within} {time.low:.3g} to {time.high:.3g}"
            off.append(f"step {_by(record['step_seconds_error'])}: {both}; {_time_cause(record['step_seconds_error'], planned)}")
    return record | {"text": _side_by_side(record), "off": off}


def _side_by_side(record: dict[str, Any]) -> str:
    memory = gigabytes(record["planned_bytes"]) if "planned_bytes" in record else "unknown"
    seconds = "unknown"
    if "planned_step_seconds" in record:
        low, high = record["planned_step_seconds_range"]
        seconds = f"{record['planned_step_seconds']:.3g} s ({low:.3g} to {high:.3g})"
    held = f"{gigabytes(record['allocated_bytes'])} measured, {gigabytes(record['reserved_bytes'])} with the allocator's cache"
    median = f"{record['measured_step_seconds']:.3g} s measured, the median of steps {FIRST + 1} to {STEPS}"
    return f"planned and measured: memory {memory}, {held}; step {seconds}, {median}"


def _by(error: float) -> str:
    return f"planned {abs(error):.0%} too {'high' if error > 0 else 'low'}"


def _memory_cause(error: float, config: Config) -> str:
    if config.compile:
        return "the plan knows nothing of compile=true"
    if error > 0:
        return "fused kernels keep less than the plan counts, or few rows came to this rank's experts"
    if config.parallel.expert > 1:
        return "this rank's experts may have more rows than an even load: see `tokenyard plan --dry-run` with hot="
    return "what an operator allocates and frees inside is not planned: see `tokenyard plan --dry-run`"


def _time_cause(error: float, planned: OwnPlan) -> str:
    if planned.gpu != planned.measured_on:
        return f"the rates were measured on {planned.measured_on}: `make gpu` and `tokenyard plan calibrate=` measure {planned.gpu}"
    if error > 0:
        return "this GPU reaches more than the rates of the plan: `make gpu` and `tokenyard plan calibrate=` measure it"
    return "waiting for data, uneven experts, a slower network, or a GPU that is shared or clocked down"
