"""Judges each step before its update: NaN, infinite or far too large, and what is then done. Every rank comes to the same verdict.

A step with a fault is computed once more. If the fault is gone it was one of the machine, and the second result is used; else it
is in the data, the weights or a device that is broken, and the policy decides.
"""

import math
from collections import deque
from enum import Enum
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from ..config.config import NumericsConfig
from ..step_flags import GlobalFlags, is_sound

# Loss and gradient norm of the last steps, and whether a new one is far above them.

LEAST = 8
"""Steps without which nothing is called a spike."""
FLOOR = 0.02
"""The least deviation, as a share of the mean: where nothing moves, little is no spike."""


LONG_TAIL = {"loss": 1.0, "gradient norm": 3.0}
"""So many times the mean, at least. The norm of healthy runs has a long tail, which clipping takes care of."""


class RecentSteps:
    """The last `size` values of both. They are the same on every rank, and so is all that follows from them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: dict[str, deque[float]] = {name: deque(maxlen=size) for name in ("loss", "gradient norm")}

    def spike(self, loss: float, norm: float, sigma: float) -> str | None:
        """In words, if one of them lies more than `sigma` standard deviations above the mean."""
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
        """Plain JSON, which keeps every bit of a float."""
        return {name: list(values) for name, values in self.values.items()}

    def restore(self, state: dict[str, Any]) -> None:
        for name, values in self.values.items():
            values.clear()
            values.extend(state.get(name, []))


class Action(Enum):
    """What is done about a step with a fault: the values of OnFault and OnSpike."""

    report = "report"
    stop = "stop"
    skip = "skip"
    rollback = "rollback"


class Fault(NamedTuple):
    kind: str
    """not_finite, spike or bad_data."""
    text: str
    action: Action


class Guard:
    """Of one run: its window of sound steps, and what was skipped."""

    def __init__(self, config: NumericsConfig) -> None:
        self.config = config
        self.window = RecentSteps(config.spike_window)
        self.skipped = 0
        """Steps without an update, so AdamW has done that many fewer than the run."""
        self.interventions = 0
        """Skips and rollbacks."""
        self.jumps: set[int] = set()
        """Steps that a rollback led around."""

    def fault(self, flags: GlobalFlags) -> Fault | None:
        """What is wrong with a step, None if nothing is."""
        if flags.bad_data:
            return Fault("bad_data", f"{said_by(flags, flags.bad_data)} could not read the rows", Action.stop)
        if not is_sound(flags):
            text = f"loss {flags.loss}, gradient norm {flags.gradient_norm}; {said_by(flags, flags.not_finite)} had it first"
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

    def took(self, flags: GlobalFlags) -> None:
        """The step was taken."""
        self.window.add(flags.loss, flags.gradient_norm)

    def may_go_on(self) -> bool:
        """After one more skip or rollback."""
        self.interventions += 1
        return self.interventions <= self.config.max_skips

    def state(self) -> dict[str, Any]:
        """For the checkpoint: plain JSON."""
        jumps = sorted(self.jumps)
        return {"window": self.window.state(), "skipped": self.skipped, "interventions": self.interventions, "jumps": jumps}

    def restore(self, state: dict[str, Any]) -> None:
        self.window.restore(state.get("window", {}))
        self.skipped = state.get("skipped", 0)
        self.interventions = max(self.interventions, state.get("interventions", 0))
        self.jumps |= set(state.get("jumps", []))


def said_by(flags: GlobalFlags, ranks: int) -> str:
    return f"rank {flags.rank}" if flags.rank is not None else f"{ranks} ranks"
