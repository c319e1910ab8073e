"""Runs of `tokenyard train`, each in its own process and folder, and their curves. Complete runs are not repeated."""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...train.logging.journal import read_journal
from .plan import Size, TrainingRun, run_settings, settings

SETTINGS = "settings.json"
"""The file in a run folder with the settings of the run."""


class Curve(NamedTuple):
    """The evaluations of a run."""

    tokens: list[int]
    losses: list[float]
    """Nats per token."""
    imbalance: float
    """Tokens of the busiest expert over an even share, in the worst layer of the last evaluation; 0 for a dense model."""
    dropped: float
    """Share of the choices dropped in training, the mean over the logged steps."""


def read_curve(folder: Path) -> Curve:
    """Reads the curve from metrics.jsonl of a run folder."""
    records = read_journal(folder / "metrics.jsonl")
    seen = [record for record in records if "validation_loss" in record]
    dropped = sum(record["dropped_fraction"] for record in records) / len(records)
    imbalance = seen[-1].get("validation/load_max_over_mean", 0.0)
    return Curve([record["tokens"] for record in seen], [record["validation_loss"] for record in seen], imbalance, dropped)


def complete(folder: Path) -> bool:
    """Whether the run in this folder has finished."""
    events = folder / "events.jsonl"
    return events.exists() and any(record["event"] == "finished" for record in read_journal(events))


def crossing(tokens: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Returns the tokens after which a curve first reaches `target`, interpolated linearly in the logarithm of the tokens.

    None if it never does. If the first point is already below, its tokens, which are an upper bound.
    """
    for index, loss in enumerate(losses):
        if loss > target:
            continue
        if index == 0:
            return tokens[0]
        before, after = losses[index - 1], loss
        share = (before - target) / (before - after)
        return math.exp(math.log(tokens[index - 1]) * (1 - share) + math.log(tokens[index]) * share)
    return None


def deviation(values: Sequence[float]) -> float:
    """Returns sample standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass
class Lab:
    """The folder of the runs, and the settings they share."""

    folder: Path
    size: Size
    variants: dict[str, list[str]]
    more: list[str]
    """Settings of all runs, which override those of the size."""
    evaluations: int = 10
    """Evaluations in each run."""
    processes: int = 1
    """Runs at a time."""
    threads: int = 1
    """Threads of each run."""

    def settings(self, run: TrainingRun) -> list[str]:
        """Returns all settings that decide the result of the run."""
        return [*settings(self.size, self.variants[run.variant], self.more), *run_settings(run, self.evaluations)]

    def place(self, run: TrainingRun) -> Path:
        return self.folder / run.name

    def train(self, runs: Iterable[TrainingRun]) -> None:
        """Trains the runs that are not complete, from their newest checkpoints. Raises RuntimeError for the first that fails."""
        todo = [run for run in runs if not complete(self.prepared(run))]
        with ThreadPoolExecutor(self.processes) as pool:
            for run, code in zip(todo, pool.map(self.start, todo), strict=True):
                if not complete(self.place(run)):
                    end = f"ended before its last step with exit code {code}"
                    raise RuntimeError(f"{run.name} {end}; its output is in {self.place(run) / 'output.txt'}")

    def prepared(self, run: TrainingRun) -> Path:
        """Returns the folder of a run. Raises ValueError if it holds a run with other settings."""
        folder, wanted = self.place(run), self.settings(run)
        file = folder / SETTINGS
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(wanted, indent=1))
        found = json.loads(file.read_text())
        if found != wanted:
            differ = " ".join(sorted(set(found) ^ set(wanted)))
            raise ValueError(f"--out={self.folder}: {folder.name} was run with other settings ({differ}); take another folder")
        return folder

    def start(self, run: TrainingRun) -> int:
        """Trains the run. Returns the exit code."""
        folder = self.place(run)
        print(f"quality: {run.name}", flush=True)
        command = [sys.executable, "-m", "tokenyard.train", *self.settings(run), f"run.dir={folder}"]
        threads = {"OMP_NUM_THREADS": str(self.threads)}
        with (folder / "output.txt").open("w") as output:
            return subprocess.run(
                command, env=os.environ | threads, stdout=output, stderr=subprocess.STDOUT, check=False
            ).returncode

    def curve(self, run: TrainingRun) -> Curve:
        """Returns the curve of a complete run."""
        return read_curve(self.place(run))

    def curves(self, runs: Iterable[TrainingRun]) -> list[Curve]:
        """Returns the curves of the complete runs among `runs`."""
        return [self.curve(run) for run in runs if complete(self.place(run))]
