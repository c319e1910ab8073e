"""Runs of `tokenyard train` in processes of their own, a folder each; what is complete is not run again."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .curves import Curve, complete, read_curve
from .plan import Size, TrainingRun, run_settings, settings

SETTINGS = "settings.json"
"""In a run folder: what it was started with."""


@dataclass
class Lab:
    """Where runs are made, and with what."""

    folder: Path
    size: Size
    variants: dict[str, list[str]]
    more: list[str]
    """Settings of all runs, which win over those of the size."""
    evaluations: int = 10
    """In each run."""
    processes: int = 1
    """Runs at a time."""
    threads: int = 1
    """Of each."""

    def settings(self, run: TrainingRun) -> list[str]:
        """All that decides what the run computes."""
        return [*settings(self.size, self.variants[run.variant], self.more), *run_settings(run, self.evaluations)]

    def place(self, run: TrainingRun) -> Path:
        return self.folder / run.name

    def train(self, runs: Iterable[TrainingRun]) -> None:
        """Those that are not complete, from their newest checkpoints. RuntimeError for the first that does not come to its end."""
        todo = [run for run in runs if not complete(self.prepared(run))]
        with ThreadPoolExecutor(self.processes) as pool:
            for run, code in zip(todo, pool.map(self.start, todo), strict=True):
                if not complete(self.place(run)):
                    end = f"ended before its last step with exit code {code}"
                    raise RuntimeError(f"{run.name} {end}; its output is in {self.place(run) / 'output.txt'}")

    def prepared(self, run: TrainingRun) -> Path:
        """The folder of a run. ValueError if it has one of other settings."""
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
        """Trains; returns the exit code."""
        folder = self.place(run)
        print(f"quality: {run.name}", flush=True)
        command = [sys.executable, "-m", "tokenyard.train", *self.settings(run), f"run.dir={folder}"]
        threads = {"OMP_NUM_THREADS": str(self.threads)}
        with (folder / "output.txt").open("w") as output:
            return subprocess.run(
                command, env=os.environ | threads, stdout=output, stderr=subprocess.STDOUT, check=False
            ).returncode

    def curve(self, run: TrainingRun) -> Curve:
        """Of a complete run."""
        return read_curve(self.place(run))

    def curves(self, runs: Iterable[TrainingRun]) -> list[Curve]:
        """Of those that are complete."""
        return [self.curve(run) for run in runs if complete(self.place(run))]
