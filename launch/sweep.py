"""`tokenyard train -m`: runs each point of a sweep as a process of its own; Hydra's sweeper chooses the points."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..train.config.compose import Arguments, check_arguments, one_line_errors
from ..train.config.config import ConfigError
from ..train.config.overrides import Groups, parse_override, split_override
from ..train.config.private_files import new_run_folder
from ..train.config.schema import quoted
from ..train.show import hydra_application


def multirun(arguments: Arguments) -> int:
    """Runs all points, even if some fail. Returns 0, or 1 if any failed. Raises ConfigError for wrong overrides."""
    groups = check_arguments(arguments, sweep=True)
    sweep = _sweep_folder(arguments, groups)
    codes: list[int] = []

    def job(_: Any) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        point = HydraConfig.get()
        folder = sweep / str(point.job.num)
        codes.append(_run_point(list(point.overrides.task), folder, arguments, groups))
        return _last_loss(folder)

    with one_line_errors(groups):
        hydra_application(job, arguments, ["--multirun"], [f"hydra.sweep.dir={quoted(str(sweep))}"])
    return int(any(codes))


def _run_point(overrides: list[str], folder: Path, arguments: Arguments, groups: Groups) -> int:
    """Runs one point in a new process, so that no state is shared with the next. Returns its exit code."""
    own = [text for text in overrides if parse_override(text, groups).key_or_group != "run.dir"]
    config_dir = [f"--config-dir={arguments.config_dir}"] if arguments.config_dir else []
    command = [sys.executable, "-m", "tokenyard", "train", *config_dir, *own, f"run.dir={quoted(str(folder))}"]
    code = subprocess.run(command, check=False).returncode
    print(f"{' '.join(own)}: {folder}, exit code {code}", flush=True)
    return code


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


def _last_loss(folder: Path) -> float | None:
    """Returns the loss of the last logged step, which sweepers may minimise; None if nothing was logged."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    return json.loads(lines[-1]).get("loss") if lines else None
