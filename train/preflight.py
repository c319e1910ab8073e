"""What can be refused before torch is imported: broken rules, paths that lead nowhere, a checkpoint that cannot be resumed."""

from pathlib import Path
from typing import Any

from ..data.checks import check_corpus, check_tokenizer
from .config.config import Config, ConfigError
from .config.environment import job_restarted
from .config.launch import Launcher
from .config.schema import nearest_text
from .config.serialize import config_from_plain, leaves, shown_config
from .config.validate import check_rules

QUIET = ("run.", "launch.", "log.", "sample.", "checkpoint.resume")
"""Beginnings of settings that say nothing about the training."""


def validate(config: Config, world: int) -> None:
    """ConfigError for a rule that `config` breaks on `world` ranks, and for a path that leads nowhere."""
    check_rules(config, world)
    # Paths in containers are nothing to look up here; the ranks look them up there.
    if config.launch.kind is not Launcher.kubernetes:
        check_files(config)


def check_files(config: Config) -> None:
    """ConfigError for a path that leads nowhere."""
    try:
        check_corpus(config.data)
        check_tokenizer(config.tokenizer)
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    folder = config.run.dir
    if folder is not None and Path(folder).is_file():
        raise ConfigError.of("run.dir", folder, "must be a folder or not exist yet", "run.dir=null")
    check_resume(config)


def refuse_another_run(config: Config, facts: dict[str, Any], path: Path) -> None:
    """ConfigError, naming the setting, for another model or order of the data than the checkpoint `path` was made with."""
    saved = config_from_plain(facts["config"])
    same = {
        "model": (saved.model, config.model),
        "sequence_length": (saved.sequence_length, config.sequence_length),
        "batch.sequences": (saved.batch.sequences, config.batch.sequences),
        "seed": (saved.seed, config.seed),
    }
    refuse_difference(same, path)


def refuse_difference(same: dict[str, tuple[Any, Any]], path: Path) -> None:
    """ConfigError for the first key whose value in the checkpoint is not the one now."""
    for key, (before, now) in same.items():
        if before != now:
            key, before, now = first_difference(key, before, now)
            raise ConfigError(
                f"{key}={now}: the checkpoint {path} was made with {before}; nearest valid: {key}={before} or a new run.dir"
            )


def first_difference(key: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """Down to the setting that differs."""
    if hasattr(before, "__dataclass_fields__"):
        for name in before.__dataclass_fields__:
            if getattr(before, name) != getattr(now, name):
                return first_difference(f"{key}.{name}", getattr(before, name), getattr(now, name))
    return key, getattr(before, "value", before), getattr(now, "value", now)


def changes(facts: dict[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that are others than in the checkpoint, by key: before and now."""
    before, now = (dict(leaves(plain)) for plain in (shown_config(config_from_plain(facts["config"])), shown_config(config)))
    return {key: (before[key], now[key]) for key in now if before[key] != now[key] and not key.startswith(QUIET)}


def check_resume(config: Config) -> None:
    """ConfigError for a path that is no checkpoint, of a newer format or incomplete; and for one that another model has written."""
    wish, folder = config.checkpoint.resume, config.run.dir
    if folder is not None and job_restarted() and _goes_on(wish, Path(folder)):
        _check_run(config, Path(folder))
    elif wish not in ("auto", "never"):
        _check_path(config, Path(wish))
    elif wish == "auto" and folder is not None:
        _check_run(config, Path(folder))


def _goes_on(wish: str, folder: Path) -> bool:
    from .run_folder import goes_on

    return goes_on(wish, folder)


def _check_path(config: Config, path: Path) -> None:
    from ..checkpoint.folder import checkpoints_of

    if not path.is_dir():
        nearest = nearest_text(str(path), ["auto", "never", *_beside(path)])
        rule = "must be auto, never or the path of a checkpoint"
        raise ConfigError.of("checkpoint.resume", str(path), rule, f"checkpoint.resume={nearest}")
    found = checkpoints_of(path)
    if not found:
        rule = "is neither a checkpoint nor a run folder with one"
        raise ConfigError.of("checkpoint.resume", str(path), rule, "checkpoint.resume=auto")
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
    """The newest checkpoint that can be read says what model it is of; which one is whole is found out later, by all ranks."""
    from ..checkpoint.folder import checkpoints_of
    from ..checkpoint.manifest import DamagedCheckpoint, read_manifest

    for path in checkpoints_of(folder) if folder.is_dir() else []:
        try:
            facts = read_manifest(path).facts
        except DamagedCheckpoint:
            continue
        refuse_another_run(config, facts, path)
        return


def _beside(path: Path) -> list[str]:
    """The folders where `path` should be one."""
    return [str(other) for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
