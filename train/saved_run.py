"""--from RUN_FOLDER: the settings of a run's config.yaml as overrides before those of the command line, which therefore win."""

from pathlib import Path
from typing import Any

from ..checkpoint.bounded import read_regular
from ..checkpoint.facts import DEEPEST, check_plain
from .config.compose import Arguments, check_arguments, compose_arguments
from .config.config import Config, ConfigError
from .config.overrides import parse_override, split_override
from .config.redact import PLACEHOLDER
from .config.schema import quoted, written
from .config.serialize import config_from_plain, leaves, plain_config

CONFIG = "config.yaml"
LARGEST_CONFIG = 1 << 16
"""Limit for the bytes of config.yaml; a run writes some thousand."""
LEFT_OUT = ("run.dir", "checkpoint.resume")
"""The folder is the one that is named, and a run goes on from its newest checkpoint, wherever it began."""


def with_run(arguments: Arguments) -> Arguments:
    """Returns `arguments` with the settings of the run that --from names, if it names one.

    An option of a group replaces all settings of its section, and each setting that it changes anywhere else. Raises ConfigError,
    one line, for a folder without a readable config.yaml, and for a setting that was a secret, which that file does not hold.
    """
    if arguments.from_run is None:
        return arguments
    folder, groups = Path(arguments.from_run).expanduser(), check_arguments(arguments, sweep=arguments.multirun)
    saved, keys = _read_run(folder), [split_override(text)[0].lstrip("+~") for text in arguments.overrides]
    options = [text for text, key in zip(arguments.overrides, keys, strict=True) if key in groups]
    fixed = [text for text in options if not parse_override(text, groups).is_sweep_override()]
    composed = (compose_arguments(Arguments(**{**vars(arguments), "overrides": overrides})) for overrides in ([], fixed))
    default, base = (dict(leaves(plain_config(config))) for config in composed)
    replaced = {key for key in keys if key in groups}
    if "checkpoint.init" in keys:
        replaced |= {"model", "tokenizer"}  # which the new source gives
    added = []
    for key, value in leaves(plain_config(saved)):
        if key in (*LEFT_OUT, *keys) or key.split(".")[0] in replaced or base[key] != default[key]:
            continue
        of_source = saved.checkpoint.init is not None and key.startswith(("model.", "tokenizer."))
        if of_source or value != base[key]:  # a source has other values than `base`
            if PLACEHOLDER.search(str(value)):
                rule = f"is without its secrets in {folder / CONFIG}"
                raise ConfigError.of(key, value, rule, f"{key}=... beside --from {folder}, with them")
            added.append(f"{key}={_text(value)}")
    if not arguments.multirun:  # the points of a sweep have folders of their own
        added.append(f"run.dir={quoted(str(folder))}")
    return Arguments(**{**vars(arguments), "overrides": [*added, *arguments.overrides], "from_run": None})


def _text(value: Any) -> str:
    """The value as Hydra reads it."""
    match value:
        case str():
            return quoted(value)
        case list():
            return f"[{','.join(map(_text, value))}]"
        case dict():
            return f"{{{','.join(f'{key}:{_text(item)}' for key, item in value.items())}}}"
    return written(value)


def _read_run(folder: Path) -> Config:
    if not (folder / CONFIG).is_file():
        near = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        runs = sorted(near.glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime)
        rule = f"must be the folder of a run, with its {CONFIG}"
        raise ConfigError.of("--from", folder, rule, f"--from {runs[-1].parent if runs else 'RUN_FOLDER'}")
    try:
        return config_from_plain(read_plain(folder / CONFIG))
    except ValueError as error:
        raise ConfigError(f"--from {folder}: {' '.join(str(error).split())}") from error


def read_plain(path: Path) -> dict[str, Any]:
    """Returns the configuration in `path` as plain values; nothing is resolved. Raises ValueError for what a run does not write."""
    import yaml

    try:
        text = read_regular(path, LARGEST_CONFIG).decode()
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            # An alias can expand some lines to millions, and deep nesting is slow to parse.
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
                raise ValueError(f"may have no aliases, and no more than {DEEPEST} levels")
        plain = yaml.safe_load(text)
        check_plain(plain, "the configuration")
    except (yaml.YAMLError, RecursionError, OSError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(plain, dict):
        raise ValueError("must hold the configuration of a run")
    return plain
