"""`tokenyard train`: trains in this process, starts ranks, prints or submits a job for a cluster, or runs a sweep."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..data.errors import DataUnavailable
from ..train.config.compose import Arguments, check_arguments, one_line_errors, parse_arguments
from ..train.config.config import Config, ConfigError
from ..train.config.elastic import check_host_counts
from ..train.config.environment import world_size
from ..train.config.launch import Launcher
from ..train.config.overrides import Groups, parse_override, split_override
from ..train.config.own_files import new_run_folder
from ..train.config.schema import quoted
from ..train.preflight import check_config, check_start
from ..train.rank_command import refuse, run_here
from ..train.saved_run import with_run
from ..train.weight_source import compose_run


def train_command(argv: list[str]) -> int:
    """Returns the exit code of the run, of the first rank that failed, or 1 if a point of a sweep failed."""
    try:
        arguments = with_run(parse_arguments(argv))
        if arguments.prints():
            from ..train.show import show

            return show(arguments)
        if arguments.multirun:
            return multirun(arguments)
        config, _ = compose_run(arguments)
        started = config.launch.kind is not Launcher.inline
        check_config(config, config.launch.nodes * config.launch.ranks if started else world_size())
        check_host_counts(config)
        check_start(config)
        return start(config, arguments, argv)
    except ConfigError as error:
        return refuse(error)
    except DataUnavailable as stop:
        return refuse(stop, stop.exit_code)


def start(config: Config, arguments: Arguments, argv: list[str]) -> int:
    """Starts a valid configuration with its launcher. Returns the exit code. Raises ConfigError if that is not possible here."""
    match config.launch.kind:
        case Launcher.inline:
            return run_here(config)
        case Launcher.torchrun:
            from .launchers.torchrun import check_hosts, start_ranks

            check_hosts(config)
            return start_ranks(config, argv)
        case Launcher.deepspeed:
            from .launchers.deepspeed import start_deepspeed

            return start_deepspeed(config, arguments)
        case Launcher.slurm:
            from .launchers.slurm import start_job

            return start_job(config, arguments)
        case Launcher.kubernetes:
            from .launchers.kubernetes import start_train_job

            return start_train_job(config, arguments)


# `tokenyard train -m`: each point of a sweep is a process of its own; Hydra's sweeper chooses the points.


def multirun(arguments: Arguments) -> int:
    """Runs all points, even if some fail. Returns 0, or 1 if any failed. Raises ConfigError for wrong overrides."""
    from ..train.show import hydra_application

    groups = check_arguments(arguments, sweep=True)
    sweep = _sweep_folder(arguments, groups)
    codes: list[int] = []

    def job(_: Any) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        point = HydraConfig.get()
        folder = sweep / str(point.job.num)
        codes.append(_run_point(list(point.overrides.task), folder, arguments, groups))
        metrics = folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        return json.loads(lines[-1]).get("loss") if lines else None  # of the last logged step, which sweepers may minimise

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
