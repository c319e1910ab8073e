"""Judges each step before its update: NaN, infinite or far too large, and what is then done. Every rank comes to the same verdict.

A step with a fault is computed once more. If the fault is gone it was one of the machine, and the second result is used; else it
is in the data, the weights or a device that is broken, and the policy decides.
"""

from enum import Enum
from typing import Any, NamedTuple

from ..config.config import NumericsConfig
from .flags import Told, is_sound
from .spikes import Window


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
        self.window = Window(config.spike_window)
        self.skipped = 0
        """Steps without an update, so AdamW has done that many fewer than the run."""
        self.interventions = 0
        """Skips and rollbacks."""
        self.jumps: set[int] = set()
        """Steps that a rollback led around."""

    def fault(self, told: Told) -> Fault | None:
        """What is wrong with a step, None if nothing is."""
        if told.bad_data:
            return Fault("bad_data", f"{said_by(told, told.bad_data)} could not read the rows", Action.stop)
        if not is_sound(told):
            text = f"loss {told.loss}, gradient norm {told.gradient_norm}; {said_by(told, told.not_finite)} had it first"
            return Fault("not_finite", text, Action(self.config.on_nan.value))
        sigma = self.config.spike_sigma
        spike = self.window.spike(told.loss, told.gradient_norm, sigma) if sigma is not None else None
        return Fault("spike", spike, Action(self.config.on_spike.value)) if spike else None

    def accepts(self, told: Told) -> bool:
        """Whether the first result of a step is used."""
        return self.fault(told) is None

    def accepts_again(self, told: Told) -> bool:
        """Whether the result of a repeated step is used."""
        fault = self.fault(told)
        return fault is None or fault.action is Action.report

    def took(self, told: Told) -> None:
        """The step was taken."""
        self.window.add(told.loss, told.gradient_norm)

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


def said_by(told: Told, ranks: int) -> str:
    return f"rank {told.rank}" if told.rank is not None else f"{ranks} ranks"
