"""Judges each step before its update: is it NaN, infinite or far too large? Every rank comes to the same verdict.

A step with a fault is computed once more. If the fault is gone, the machine caused it, and the second result is used; otherwise it
is in the data, the weights or a broken device, and the policy decides.
"""

import math
from collections import deque
from enum import Enum
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from ..config.config import NumericsConfig
from ..step_flags import GlobalFlags, is_sound

LEAST = 8
"""Steps that must be known before anything is called a spike."""
FLOOR = 0.02
"""The least deviation, as a share of the mean, so that a small change after a flat stretch is no spike."""
LONG_TAIL = {"loss": 1.0, "gradient norm": 3.0}
"""A spike is at least this multiple of the mean. The norm of healthy runs has a long tail, which clipping handles."""


class RecentSteps:
    """Loss and gradient norm of the last `size` steps, which are the same on every rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: dict[str, deque[float]] = {name: deque(maxlen=size) for name in ("loss", "gradient norm")}

    def spike(self, loss: float, norm: float, sigma: float) -> str | None:
        """Describes the spike if one of them is more than `sigma` standard deviations above the mean, otherwise returns None."""
        for (name, values), value in zip(self.values.items(), (loss, norm), strict=True):
            if len(values) >= max(LEAST, self.size // 4):
                mean = fmean(values)
                deviation = max(pstdev(values), FLOOR * abs(mean))
                if value > max(mean + sigma * deviation, LONG_TAIL[name] * mean):
                    return f"{name} {value:.4g} is {(value - mean) / deviation:.1f} sigma above {mean:.4g}"
        return None

    def add(self, loss: float, norm: float) -> None:
        for values, value in zip(self.values.values(), (loss, norm), strict=True):
            if math.isfinite(value):
                values.append(value)

    def state(self) -> dict[str, Any]:
        """Returns the values as plain JSON, which keeps every bit of a float."""
        return {name: list(values) for name, values in self.values.items()}

    def restore(self, state: dict[str, Any]) -> None:
        for name, values in self.values.items():
            values.clear()
            values.extend(state.get(name, []))


class Action(Enum):
    """What to do about a step with a fault: the values of OnFault and OnSpike."""

    report = "report"
    stop = "stop"
    skip = "skip"
    rollback = "rollback"


class Fault(NamedTuple):
    kind: str
    """not_finite, spike, bad_data or overflow."""
    text: str
    action: Action


class Guard:
    """Judges the steps of one run, by its window of sound steps, and counts what was skipped."""

    def __init__(self, config: NumericsConfig) -> None:
        self.config = config
        self.window = RecentSteps(config.spike_window)
        self.skipped = 0
        """Steps without an update, which AdamW has not counted."""
        self.interventions = 0
        """Skips and rollbacks."""
        self.jumps: set[int] = set()
        """Steps that are jumped over after a rollback."""

    def fault(self, flags: GlobalFlags) -> Fault | None:
        """Returns what is wrong with a step, None if nothing is."""
        if flags.bad_data:
            return Fault("bad_data", f"{ranks_of(flags, flags.bad_data)} could not read the rows", Action.stop)
        if flags.overflow:
            return Fault("overflow", f"{flags.overflow} rows had no room in the exchange", Action.stop)
        if not is_sound(flags):
            text = f"loss {flags.loss}, gradient norm {flags.gradient_norm}; {ranks_of(flags, flags.not_finite)} had it first"
            return Fault("not_finite", text, Action(self.config.on_nan.value))
        sigma = self.config.spike_sigma
        spike = self.window.spike(flags.loss, flags.gradient_norm, sigma) if sigma is not None else None
        return Fault("spike", spike, Action(self.config.on_spike.value)) if spike else None

    def accepts(self, flags: GlobalFlags) -> bool:
        """Whether the first result of a step is used."""
        return self.fault(flags) is None

    def accepts_again(self, flags: GlobalFlags) -> bool:
        """Whether the result of a repeated step is used."""
        fault = self.fault(flags)
        return fault is None or fault.action is Action.report

    def record(self, flags: GlobalFlags) -> None:
        """Adds an accepted step to the window."""
        self.window.add(flags.loss, flags.gradient_norm)

    def may_intervene(self) -> bool:
        """Counts one more skip or rollback. Returns whether it is allowed."""
        self.interventions += 1
        return self.interventions <= self.config.max_skips

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint contains of this: plain JSON."""
        jumps = sorted(self.jumps)
        return {"window": self.window.state(), "skipped": self.skipped, "interventions": self.interventions, "jumps": jumps}

    def restore(self, state: dict[str, Any]) -> None:
        self.window.restore(state.get("window", {}))
        self.skipped = state.get("skipped", 0)
        self.interventions = max(self.interventions, state.get("interventions", 0))
        self.jumps |= set(state.get("jumps", []))


def ranks_of(flags: GlobalFlags, ranks: int) -> str:
    """Returns the single rank with a fault, or how many ranks have it, in words."""
    return f"rank {flags.rank}" if flags.rank is not None else f"{ranks} ranks"
