"""Writes a run to trackio: a local database that `trackio show` opens, without an account. No other file imports trackio."""

import contextlib
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...config.config import TrackerConfig
from ..expert_stats.alerts import TITLES
from .base import AbstractTracker
from .sections import charted


class TrackioTracker(AbstractTracker):
    """A run in trackio's own folder (TRACKIO_DIR), named after the run folder and its id, which a resumed run keeps."""

    name = "trackio"

    def __init__(self, config: TrackerConfig, run_dir: Path, run_id: str, run_name: str | None = None):
        self._config, self._name = config, f"{run_name or run_dir.name}-{run_id}"
        self._run: Any = None

    def start(self, facts: Mapping[str, Any]) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # trackio prints how to open its dashboard
            import trackio

            self._run = trackio.init(
                project=self._config.project,
                name=self._name,
                group=os.environ.get("WANDB_RUN_GROUP"),
                config=dict(facts),
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, record: Mapping[str, Any]) -> None:
        self._run.log(finite(charted(record)), step=record["step"])

    def alert(self, kind: str, text: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # the console has a line of our own
            self._run.alert(title=TITLES.get(kind, kind), text=text)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._run.log({"sample": prompt + text}, step=step)

    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        self._run.log({f"final/{key}": value for key, value in finite(summary).items()} | {"final/exit_code": exit_code})
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record with numbers that are not finite as text, since a chart cannot show them."""
    return {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
