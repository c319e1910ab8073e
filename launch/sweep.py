"""`tokenyard train -m`: a sweep. Each point is a process and a folder of its own; Hydra's sweeper chooses the points.

The folder of a point is named by what differs between points, and holds what became of it. So the same command goes on where a
sweep was interrupted, whichever launcher of Hydra runs the points, in this process or elsewhere.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..data.errors import DataUnavailable
from ..report.headline import last_of_end, state
from ..report.journal_reader import RunError
from ..report.run_reader import POINT, Run
from ..train.config.compose import SEARCH_PATH, Arguments, check_arguments, one_line_errors
from ..train.config.config import ConfigError
from ..train.config.overrides import Groups, parse_override, split_override
from ..train.config.own_files import new_run_folder
from ..train.config.schema import quoted
from .words import aligned

SETTINGS = "sweep.json"
"""The settings that all points share, in the folder of the sweep."""
LONGEST_NAME = 120
COLUMNS = ("loss", "validation", "tokens/s", "imbalance", "state")


@dataclass
class Point:
    """A point of a sweep."""

    folder: Path
    differs: list[str]
    """The overrides that other points have with other values."""
    code: int | None
    """The exit code; None if the point has not ended."""

    @cached_property
    def run(self) -> Run | None:
        """What its run has written; None if nothing can be read."""
        try:
            return Run(self.folder)
        except RunError:
            return None

    @property
    def failed(self) -> bool:
        """Whether it ended with an exit code after which it does not go on by itself."""
        return self.code not in (None, 0, DataUnavailable.exit_code)


def multirun(arguments: Arguments) -> int:
    """Runs all points, even if some fail, and prints a table. Returns 0, or 1 if any failed.

    Points that have finished do not run again, and those that failed only with --retry. Raises ConfigError for wrong overrides.
    """
    from ..train.show import hydra_application

    groups = check_arguments(arguments, sweep=True)
    sweep = _sweep_folder(arguments, groups)
    fixed = [text for text in arguments.overrides if _is_of_all_points(text, groups)]
    _check_settings(sweep, fixed)
    job = partial(_run_point, sweep, fixed, arguments)
    with one_line_errors(groups):
        hydra_application(job, arguments, ["--multirun"], [f"hydra.sweep.dir={quoted(str(sweep))}", "hydra.sweep.subdir=."])
    points = _points(sweep)
    print("\n".join(_table(points)))
    failed = sum(point.failed for point in points)
    if failed:
        print(f"{failed} of {len(points)} points failed; to run them again: the same command with run.dir={sweep} --retry")
    print(f"to compare the others: tokenyard report {sweep}")
    return int(any(point.code for point in points))


def _is_of_all_points(text: str, groups: Groups) -> bool:
    override = parse_override(text, groups)
    return not override.is_sweep_override() and not override.key_or_group.startswith(("run.dir", "hydra"))


def _sweep_folder(arguments: Arguments, groups: Groups) -> Path:
    """Returns run.dir if it was given, else a new folder; it holds a folder for each point."""
    chosen = [override for text in arguments.overrides if (override := parse_override(text, groups)).key_or_group == "run.dir"]
    if not chosen or chosen[-1].value() is None:
        return Path(new_run_folder())
    if chosen[-1].is_sweep_override():
        raise ConfigError.of(
            *split_override(chosen[-1].input_line or ""), "is the folder of the whole sweep", f"run.dir={new_run_folder()}"
        )
    return Path(str(chosen[-1].value()))


def _check_settings(sweep: Path, fixed: list[str]) -> None:
    """Writes the settings that all points share. Raises ConfigError if the folder has points with others."""
    path = sweep / SETTINGS
    if path.is_file():
        if differ := sorted({*json.loads(path.read_text())} ^ {*fixed}):
            rule = f"holds a sweep with other settings for all its points ({', '.join(differ)})"
            raise ConfigError.of("run.dir", sweep, rule, f"run.dir={new_run_folder()}")
        return
    sweep.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fixed))


def _run_point(sweep: Path, fixed: list[str], arguments: Arguments, _: Any) -> float | None:
    """Runs one point, if it has to run, in a new process, so that no state is shared with the next.

    Returns its loss, which sweepers may minimise.
    """
    from hydra.core.hydra_config import HydraConfig

    own = [text for text in HydraConfig.get().overrides.task if not text.startswith("run.dir=")]
    differs = [text for text in own if text not in fixed]
    point = _read(sweep / point_name(differs), differs)
    if point.code != 0 and (arguments.retry or not point.failed):
        config_dir = [f"--config-dir={arguments.config_dir}"] if arguments.config_dir else []
        folders = [text for text in arguments.overrides if split_override(text)[0] == SEARCH_PATH]
        command = [sys.executable, "-m", "tokenyard", "train", *config_dir, *folders, *own, f"run.dir={quoted(str(point.folder))}"]
        code = subprocess.run(command, check=False, env={"WANDB_RUN_GROUP": sweep.resolve().name, **os.environ}).returncode
        point.folder.mkdir(exist_ok=True)
        (point.folder / POINT).write_text(json.dumps({"differs": differs, "code": code}))
        print(f"{' '.join(differs)}: {point.folder}, exit code {code}", flush=True)
        point = Point(point.folder, differs, code)
    return loss_of(point.run)


def loss_of(run: Run | None) -> float | None:
    """Returns the loss of the last validation, else of the last logged step."""
    if run is None:
        return None
    validation = last_of_end(run, "validation_loss")
    return run.metrics.last("loss") if validation is None else validation


def point_name(differs: Sequence[str]) -> str:
    """Returns the name of a point's folder: what differs, each key by as many of its last words as tell it from the others.

    It has no character that a shell or an override takes for something else.
    """
    keys = [split_override(text)[0].lstrip("+~") for text in differs]
    short = [_tail(key, keys) for key in keys]
    name = "+".join(f"{key}-{split_override(text)[1]}" for key, text in zip(short, differs, strict=True))
    plain = re.sub(r"[^\w.+-]+", "_", name).lstrip(".-") or "point"
    return (
        plain if plain == name and len(name) <= LONGEST_NAME else f"{plain[:LONGEST_NAME]}-{sha256(name.encode()).hexdigest()[:6]}"
    )


def _tail(key: str, keys: list[str]) -> str:
    words = key.split(".")
    tails = (".".join(words[-count:]) for count in range(1, len(words)))
    return next((tail for tail in tails if sum(f".{other}".endswith(f".{tail}") for other in keys) == 1), key)


def _read(folder: Path, differs: list[str]) -> Point:
    path = folder / POINT
    return Point(folder, differs, json.loads(path.read_text())["code"] if path.is_file() else None)


def _points(sweep: Path) -> list[Point]:
    """Returns the points that have ended, those with the lowest loss first."""
    paths = sorted(sweep.glob(f"*/{POINT}"), key=lambda path: path.stat().st_mtime)
    points = [_read(path.parent, json.loads(path.read_text())["differs"]) for path in paths]
    return sorted(points, key=lambda point: (loss_of(point.run) is None, loss_of(point.run) or 0.0))


def _table(points: list[Point]) -> list[str]:
    """Returns aligned lines: what differs first, then what came out."""
    keys = list(dict.fromkeys(split_override(text)[0] for point in points for text in point.differs))
    rows = [[_tail(key, keys) for key in keys] + list(COLUMNS)]
    for point in points:
        values = dict(map(split_override, point.differs))
        rows.append([values.get(key, "") for key in keys] + _outcome(point))
    return aligned(rows, len(keys))


def _outcome(point: Point) -> list[str]:
    run = point.run
    if run is None:
        return ["", "", "", "", f"exit code {point.code}"]
    numbers = (run.metrics.last("loss"), last_of_end(run, "validation_loss"), run.metrics.typical("tokens_per_second"))
    loss, validation, speed = (
        "" if value is None else f"{value:{form}}" for value, form in zip(numbers, (".4f", ".4f", ",.0f"), strict=True)
    )
    imbalance = run.metrics.last("moe/load_max_over_mean")
    ended = state(run) if not point.code else f"{state(run)}, exit code {point.code}"
    return [loss, validation, speed, "" if imbalance is None else f"{imbalance:.2f}", ended]
