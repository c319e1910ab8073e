"""Time accounting (goodput) of a run across its restarts: compute, overhead of several kinds, and lost time.

It is stored in events.jsonl: a cumulative event `accounting` with each checkpoint and at the end. If a start was killed, the next
one repeats its steps after the last checkpoint: their time is lost, and is read from metrics.jsonl before that file is cut.
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


class Goodput:
    """Accounts for the time of a run on the first rank: `seconds` of each kind, earlier starts included."""

    def __init__(self, folder: Path, step: int) -> None:
        """Must come before metrics.jsonl is cut to `step`, the one from which the run continues."""
        self.seconds, self.restarts = earlier_starts(folder, step)
        self.begin = monotonic() - age_of_process()
        self.accounted = 0.0
        """Seconds since `begin` that are accounted for."""
        self.training = False

    def begin_training(self) -> None:
        """Accounts all time until now to start-up."""
        self.add("startup", monotonic() - self.begin)
        self.training = True

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Accounts the time inside to `kind`."""
        begin = monotonic()
        yield
        self.add(kind, monotonic() - begin)

    def add(self, kind: str, seconds: float) -> None:
        """Accounts `seconds`, which have passed, to `kind`."""
        self.seconds[kind] += seconds
        self.accounted += seconds

    def facts(self) -> dict[str, Any]:
        """Returns the event: the seconds of each kind, the productive share, and the number of restarts."""
        rest = monotonic() - self.begin - self.accounted
        seconds = {kind: round(value, 3) for kind, value in self.seconds.items()}
        seconds["compute" if self.training else "startup"] += round(max(0.0, rest), 3)
        total = sum(seconds.values())
        return {"seconds": seconds, "productive": seconds["compute"] / total if total else 0.0, "restarts": self.restarts}


def earlier_starts(folder: Path, step: int) -> tuple[dict[str, float], int]:
    """Returns the seconds of earlier starts of the run, given that it continues after `step`; and the number of restarts."""
    seconds = dict.fromkeys(KINDS, 0.0)
    events, metrics = (readable(path) if path.exists() else [] for path in (folder / "events.jsonl", folder / "metrics.jsonl"))
    events = [event for event in events if "event" in event]
    restarts = sum(event["event"] in ("start", "resume") for event in events)
    if not restarts:
        return seconds, 0
    known, known_step = {}, 0
    for event in events:
        if event["event"] == "accounting":
            known, known_step = event.get("seconds", {}), event.get("step", 0)
    seconds |= {kind: float(known.get(kind, 0.0)) for kind in KINDS}
    for record in metrics:
        if record.get("step", 0) > step:
            step_seconds = record.get("step_seconds", 0.0)
            seconds["lost"] += step_seconds
            if record["step"] <= known_step:  # the event has counted it as work
                waited = step_seconds * record.get("data_wait_fraction", 0.0)
                seconds["compute"] = max(0.0, seconds["compute"] - step_seconds + waited)
                seconds["data"] = max(0.0, seconds["data"] - waited)
    seconds["lost"] += seconds_between_starts(folder)
    return seconds, restarts


def seconds_between_starts(folder: Path) -> float:
    """Returns the time from the last write of the earlier start to the start of this process, if torch's launcher restarted it."""
    if not ranks_restarted():
        return 0.0
    writes = [path.stat().st_mtime for path in (folder / "metrics.jsonl", folder / "events.jsonl") if path.exists()]
    return max(0.0, time.time() - age_of_process() - max(writes)) if writes else 0.0


def age_of_process() -> float:
    """Returns the seconds since this process was started, 0 if it is not one of ours or the system does not know."""
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
    """Returns the accounting as one line, for the end of a run."""
    others = {kind: seconds for kind, seconds in facts["seconds"].items() if kind != "compute" and seconds >= 0.05}
    parts = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in others.items())
    again = f", {facts['restarts']} restarts" if facts["restarts"] else ""
    return f"productive {facts['productive']:.1%} of the time: compute {facts['seconds']['compute']:.1f} s, {parts}{again}"
