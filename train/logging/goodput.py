"""Where the time of a run went, over all of its starts: compute, or what was needed beside it, or lost.

Kept in events.jsonl: an event `accounting` with each checkpoint and at the end, cumulative. What a start that was killed did after
its last checkpoint is done again by the next one: that is lost, and is found in metrics.jsonl before it is cut.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from ..config.environment import ranks_restarted
from .journal import readable

KINDS: tuple[str, ...] = ("startup", "compute", "data", "evaluation", "checkpoint", "lost")


class Accounting:
    """Of the first rank. `seconds` has all kinds, of the starts before too."""

    def __init__(self, folder: Path, step: int) -> None:
        """Before metrics.jsonl is cut to `step`, the one from which the run goes on."""
        self.seconds, self.restarts = before(folder, step)
        self.begin = monotonic() - age_of_process()
        self.outside = 0.0
        """Seconds since `begin` that are accounted for."""
        self.training = False

    def started(self) -> None:
        """The first step begins: all until now was start-up."""
        self._add("startup", monotonic() - self.begin)
        self.training = True

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """What runs inside is of this kind."""
        begin = monotonic()
        yield
        self._add(kind, monotonic() - begin)

    def waited(self, seconds: float) -> None:
        """For data."""
        self._add("data", seconds)

    def facts(self) -> dict[str, Any]:
        """For an event: the seconds of each kind, the share of those that were productive, and the restarts."""
        rest = monotonic() - self.begin - self.outside
        seconds = {kind: round(value, 3) for kind, value in self.seconds.items()}
        seconds["compute" if self.training else "startup"] += round(max(0.0, rest), 3)
        total = sum(seconds.values())
        return {"seconds": seconds, "productive": seconds["compute"] / total if total else 0.0, "restarts": self.restarts}

    def _add(self, kind: str, seconds: float) -> None:
        self.seconds[kind] += seconds
        self.outside += seconds


def before(folder: Path, step: int) -> tuple[dict[str, float], int]:
    """What earlier starts account for, if this one goes on after `step`, and how many restarts that makes."""
    seconds = dict.fromkeys(KINDS, 0.0)
    events = [event for event in _read(folder / "events.jsonl") if "event" in event]
    if not any(event["event"] in ("start", "resume") for event in events):
        return seconds, 0
    known, known_step = {}, 0
    for event in events:
        if event["event"] == "accounting":
            known, known_step = event.get("seconds", {}), event.get("step", 0)
    seconds |= {kind: float(known.get(kind, 0.0)) for kind in KINDS}
    for record in _read(folder / "metrics.jsonl"):
        if record.get("step", 0) > step:
            seconds["lost"] += record.get("step_seconds", 0.0)
            if record["step"] <= known_step:  # it counted as work
                waited = record.get("step_seconds", 0.0) * record.get("data_wait_fraction", 0.0)
                seconds["compute"] = max(0.0, seconds["compute"] - record.get("step_seconds", 0.0) + waited)
                seconds["data"] = max(0.0, seconds["data"] - waited)
    seconds["lost"] += dead_seconds(folder)
    return seconds, sum(event["event"] in ("start", "resume") for event in events)


def dead_seconds(folder: Path) -> float:
    """After a restart by torch's launcher: from the last sign of life of the start before to that of this process."""
    if not ranks_restarted():
        return 0.0
    signs = [path.stat().st_mtime for path in (folder / "metrics.jsonl", folder / "events.jsonl") if path.exists()]
    return max(0.0, time.time() - age_of_process() - max(signs)) if signs else 0.0


def age_of_process() -> float:
    """Seconds since this process was started, if it is one of ours and the system says so."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not spec.name.startswith("tokenyard"):
        return 0.0
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))


def in_words(facts: dict[str, Any]) -> str:
    """One line for the end of a run."""
    others = {kind: seconds for kind, seconds in facts["seconds"].items() if kind != "compute" and seconds >= 0.05}
    parts = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in others.items())
    again = f", {facts['restarts']} restarts" if facts["restarts"] else ""
    return f"productive {facts['productive']:.1%} of the time: compute {facts['seconds']['compute']:.1f} s, {parts}{again}"


def _read(path: Path) -> list[dict[str, Any]]:
    return readable(path) if path.exists() else []
