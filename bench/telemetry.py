"""Measures the cost of expert statistics: `python -m tokenyard.bench.telemetry [key=value ...]`, settings as for `tokenyard train`.

Runs three runs in one process, one for each tier, in turns: a round has the same number of steps of each, in an order that rotates.
The difference of whole steps is noise on a busy machine, so the time of the calls themselves is measured too.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from ..moe import router
from ..moe.router_metrics import RouterMetrics, compute_router_metrics
from ..train.config.compose import compose
from ..train.config.config import Config
from ..train.logging.expert_stats.collector import ExpertStats, snapshot_records
from ..train.logging.journal import Journal
from ..train.run import single_step
from ..train.setup import open_session
from ..train.step import StepNumbers
from .timing import rotated

TIERS = ("none", "brief", "detailed")


class TierResult(NamedTuple):
    """Seconds, as medians over the rounds."""

    tier: str
    step: float
    """A whole step, with its record and its share of the work that is done every telemetry.every steps."""
    over_none: float
    """Relative excess over the tier none, the median over the rounds."""
    calls: float
    """The calls in a step: expert statistics, telemetry.jsonl, router metrics. On a CPU a call takes as long as its work."""
    calls_share: float
    probe: float
    """A record after an evaluation, with probe, similarity and vocabulary."""


class Timed:
    """Calls `compute_router_metrics` of moe/router.py and sums its time."""

    seconds = 0.0

    def __call__(self, *arguments: Any) -> RouterMetrics:
        start = perf_counter()
        found = compute_router_metrics(*arguments)
        self.seconds += perf_counter() - start
        return found


GAUGES = Timed()


class TierRun:
    """A run of one tier."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.session = open_session(config, torch.device("cpu"))
        self.session.parallel.model.train()
        self.expert_stats = ExpertStats(self.session)
        self.journal = Journal(folder / "telemetry.jsonl")
        self.probes: list[float] = []

    def steps(self, count: int) -> tuple[float, float]:
        """Returns the mean seconds of a step, and of the watch in it."""
        begin, watching, GAUGES.seconds = perf_counter(), 0.0, 0.0
        numbers = None
        for _ in range(count):
            numbers = single_step(self.session)
            start = perf_counter()
            self.expert_stats.update(numbers)
            record = self.record(numbers, validated=False)
            if record is not None:
                self.journal.write(record)
            watching += perf_counter() - start
        seconds, watching = (perf_counter() - begin) / count, watching + GAUGES.seconds
        assert numbers is not None
        start = perf_counter()
        self.record(numbers, validated=True)
        self.probes.append(perf_counter() - start)
        return seconds, watching / count

    def record(self, numbers: StepNumbers, validated: bool) -> dict[str, Any] | None:
        """Returns the record for telemetry.jsonl, if one is due; copies all statistics to the host."""
        snapshot = self.expert_stats.snapshot(numbers, validated, saves=False)
        if snapshot is None:
            return None
        snapshot = snapshot._replace(tensors={name: tensor.cpu() for name, tensor in snapshot.tensors.items()})
        return snapshot_records(numbers, snapshot, self.session.config, self.session.parallel.mesh.stage.size)[1]


def main() -> None:
    arguments = parse()
    lines = measure(arguments.overrides, arguments.rounds, arguments.steps)
    print(json.dumps([line._asdict() for line in lines], indent=1) if arguments.json else table(lines))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tokenyard.bench.telemetry", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="settings of the run, as model.moe.experts=16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25, help="of each tier in a round")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def measure(overrides: list[str], rounds: int, steps: int) -> list[TierResult]:
    """Measures each tier."""
    with patch.object(router, "compute_router_metrics", GAUGES), tempfile.TemporaryDirectory() as folder:
        runners = {tier: _runner(tier, overrides, Path(folder) / tier) for tier in TIERS}
        for runner in runners.values():
            runner.steps(2)
        taken: dict[str, list[tuple[float, float]]] = {tier: [] for tier in TIERS}
        for turn in range(rounds):
            for tier in rotated(list(TIERS), turn):
                taken[tier].append(runners[tier].steps(steps))
        for runner in runners.values():
            runner.journal.close()
    return [_line(tier, taken, runners[tier].probes[1:]) for tier in TIERS]


def _runner(tier: str, overrides: list[str], folder: Path) -> TierRun:
    config = compose(["tracker=jsonl", *overrides, f"run.dir={folder}", f"telemetry.tier={tier}"])
    return TierRun(config, folder)


def _line(tier: str, taken: dict[str, list[tuple[float, float]]], probes: list[float]) -> TierResult:
    step, calls = (statistics.median(values) for values in zip(*taken[tier], strict=True))
    excess = [mine / none - 1 for (mine, _), (none, _) in zip(taken[tier], taken["none"], strict=True)]
    return TierResult(tier, step, statistics.median(excess), calls, calls / step, statistics.median(probes))


def table(lines: list[TierResult]) -> str:
    head = f"{'tier':<9} {'step ms':>8} {'over none':>9} {'calls ms':>9} {'of a step':>9} {'probe ms':>9}"
    rows = (
        f"{line.tier:<9} {1e3 * line.step:>8.2f} {100 * line.over_none:>8.2f}% {1e3 * line.calls:>9.3f}"
        f" {100 * line.calls_share:>8.2f}% {1e3 * line.probe:>9.2f}"
        for line in lines
    )
    return "\n".join([head, *rows])


if __name__ == "__main__":
    main()
