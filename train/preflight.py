"""Checks before torch is imported: rules of the configuration, paths that do not exist, a checkpoint that cannot be resumed."""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..data.checks import check_corpus
from ..data.tokenizer_path import check_tokenizer
from .config.config import Config, ConfigError, Device
from .config.environment import job_restarted
from .config.launch import Launcher
from .config.schema import nearest_text
from .config.serialize import config_from_plain, leaves, shown_config
from .config.validate import check_rules
from .weight_source import HF_CONFIG

QUIET = ("run.", "launch.", "log.", "profile.", "sample.", "checkpoint.resume")
"""Prefixes of settings that do not change the training."""


def check_config(config: Config, world: int) -> None:
    """Raises ConfigError for a rule that `config` breaks on `world` ranks, and for a path that does not exist."""
    check_rules(config, world)
    # Paths in containers cannot be checked here; the ranks check them there.
    if config.launch.kind is not Launcher.kubernetes:
        check_files(config)


def check_files(config: Config) -> None:
    """Raises ConfigError for a path that does not exist, and for a checkpoint that cannot be resumed."""
    try:
        check_corpus(config.data)
        check_tokenizer(config.tokenizer)
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    folder = config.run.dir
    if folder is not None and Path(folder).is_file():
        raise ConfigError.of("run.dir", folder, "must be a folder or not exist yet", "run.dir=null")
    check_resume(config)


def check_start(config: Config) -> None:
    """Raises ConfigError for what this host lacks for the run: CUDA, a folder that can be written, data as they claim to be.

    DataUnavailable for a hub that does not answer.
    """
    if config.launch.kind not in (Launcher.slurm, Launcher.kubernetes):
        if config.device is Device.cuda and version("torch").endswith("+cpu"):
            raise ConfigError.of("device", "cuda", "torch is built without CUDA here", "device=cpu")
        if config.run.dir is not None:
            check_run_folder(Path(config.run.dir))
    check_data(config)


def check_run_folder(folder: Path) -> None:
    """Raises ConfigError if `folder` cannot be made or written, as far as one can tell without trying."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise ConfigError.of("run.dir", folder, f"{there} is a file", f"run.dir={there.parent / 'run'}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError.of("run.dir", folder, f"{there} cannot be written", "run.dir=null, for a folder in ./runs")


def check_data(config: Config) -> None:
    """Raises ConfigError for a file of data that is not what it claims to be, DataUnavailable for a hub that does not answer.

    Opens files, so that one of the ranks is enough; a job that restarts waits for its sources instead.
    """
    from ..data.first_look import look_at_data

    elsewhere = config.launch.kind is Launcher.kubernetes
    if elsewhere or job_restarted() or os.environ.get("RANK", "0") != "0":
        return
    try:
        look_at_data(config.data)
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error


def refuse_another_run(config: Config, facts: dict[str, Any], path: Path) -> None:
    """Raises ConfigError, naming the setting, if `path` is of another model, optimizer or order of the data, or an import."""
    if "source" in facts:
        raise ConfigError.of("checkpoint.resume", path, "is an import, weights without a run to resume", f"checkpoint.init={path}")
    saved = config_from_plain(facts["config"])
    same = {
        "model": (saved.model, config.model),
        "sequence_length": (saved.sequence_length, config.sequence_length),
        "batch.sequences": (saved.batch.sequences, config.batch.sequences),
        "batch.schedule": (saved.batch.schedule, config.batch.schedule),
        "seed": (saved.seed, config.seed),
        "optimizer.name": (saved.optimizer.name, config.optimizer.name),
        "optimizer.muon.router": (saved.optimizer.muon.router, config.optimizer.muon.router),
    }
    refuse_difference(same, path)


def refuse_difference(same: dict[str, tuple[Any, Any]], path: Path) -> None:
    """Raises ConfigError for the first key whose value differs from that in the checkpoint."""
    for key, (before, now) in same.items():
        if before != now:
            key, before, now = first_difference(key, before, now)
            raise ConfigError(
                f"{key}={now}: the checkpoint {path} was made with {before}; nearest valid: {key}={before} or a new run.dir"
            )


def first_difference(key: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """Returns key and values of the first setting that differs, inside of dataclasses too."""
    if hasattr(before, "__dataclass_fields__"):
        for name in before.__dataclass_fields__:
            if getattr(before, name) != getattr(now, name):
                return first_difference(f"{key}.{name}", getattr(before, name), getattr(now, name))
    return key, getattr(before, "value", before), getattr(now, "value", now)


def changes(facts: dict[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the settings that differ from those of the checkpoint, by key: before and now."""
    before, now = (dict(leaves(plain)) for plain in (shown_config(config_from_plain(facts["config"])), shown_config(config)))
    return {key: (before[key], now[key]) for key in now if before[key] != now[key] and not key.startswith(QUIET)}


def check_resume(config: Config) -> None:
    """Raises ConfigError for a path that is no checkpoint, of a newer format, incomplete, or written by another model."""
    from .run_folder import goes_on

    setting, folder = config.checkpoint.resume, config.run.dir
    if config.checkpoint.init is not None and setting not in ("auto", "never"):
        rule = f"a run that resumes from checkpoint.resume={setting} has its weights from there"
        raise ConfigError.of("checkpoint.init", config.checkpoint.init, rule, "checkpoint.init=null, or checkpoint.resume=auto")
    if folder is not None and job_restarted() and goes_on(setting, Path(folder)):
        _check_run(config, Path(folder))
    elif setting not in ("auto", "never"):
        _check_path(config, Path(setting))
    elif setting == "auto" and folder is not None:
        _check_run(config, Path(folder))


def _check_path(config: Config, path: Path) -> None:
    from ..checkpoint.folder import checkpoints_of

    if not path.is_dir():
        siblings = [str(other) for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
        nearest = nearest_text(str(path), ["auto", "never", *siblings])
        rule = "must be auto, never or the path of a checkpoint"
        raise ConfigError.of("checkpoint.resume", str(path), rule, f"checkpoint.resume={nearest}")
    found = checkpoints_of(path)
    if not found:
        rule = "is neither a checkpoint nor a run folder with one"
        nearest = f"checkpoint.init={path}" if (path / HF_CONFIG).is_file() else "checkpoint.resume=auto"
        raise ConfigError.of("checkpoint.resume", str(path), rule, nearest)
    if found == [path]:
        _check_manifest(config, path)
    else:
        _check_run(config, path)


def _check_manifest(config: Config, path: Path) -> None:
    from ..checkpoint.manifest import DamagedCheckpoint, check_sizes, read_manifest

    try:
        manifest = read_manifest(path)
        check_sizes(path, manifest)
    except DamagedCheckpoint as error:
        raise ConfigError(f"checkpoint.resume={path}: {' '.join(str(error).split())}") from error
    refuse_another_run(config, manifest.facts, path)


def _check_run(config: Config, folder: Path) -> None:
    """Checks the newest checkpoint that can be read; which one is intact is found out later, by all ranks."""
    from ..checkpoint.folder import checkpoints_of
    from ..checkpoint.manifest import DamagedCheckpoint, read_manifest

    for path in checkpoints_of(folder) if folder.is_dir() else []:
        try:
            facts = read_manifest(path).facts
        except DamagedCheckpoint:
            continue
        refuse_another_run(config, facts, path)
        return
