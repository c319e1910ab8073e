"""Can `checkpoint.resume` be what it says? Asked of names, sizes and the manifest, before torch is imported and ranks meet."""

from pathlib import Path

from ..config.config import Config, ConfigError
from ..config.environment import started_again
from ..config.schema import nearest_text


def check_resume(config: Config) -> None:
    """ConfigError for a path that is no checkpoint, of a newer format or incomplete; and for one that another model has written."""
    wish, folder = config.checkpoint.resume, config.run.dir
    if folder is not None and started_again() and _goes_on(wish, Path(folder)):
        _check_run(config, Path(folder))
    elif wish not in ("auto", "never"):
        _check_path(config, Path(wish))
    elif wish == "auto" and folder is not None:
        _check_run(config, Path(folder))


def _goes_on(wish: str, folder: Path) -> bool:
    from .timeline import goes_on

    return goes_on(wish, folder)


def _check_path(config: Config, path: Path) -> None:
    from ...checkpoint.folder import checkpoints_of

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
    from ...checkpoint.manifest import DamagedCheckpoint, check_sizes, read_manifest
    from .same_run import refuse_another_run

    try:
        manifest = read_manifest(path)
        check_sizes(path, manifest)
    except DamagedCheckpoint as error:
        raise ConfigError(f"checkpoint.resume={path}: {' '.join(str(error).split())}") from error
    refuse_another_run(config, manifest.facts, path)


def _check_run(config: Config, folder: Path) -> None:
    """The newest checkpoint that can be read says what model it is of; which one is whole is found out later, by all ranks."""
    from ...checkpoint.folder import checkpoints_of
    from ...checkpoint.manifest import DamagedCheckpoint, read_manifest
    from .same_run import refuse_another_run

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
