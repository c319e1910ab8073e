"""--from RUN_FOLDER: the settings of a run's config.yaml as overrides before those of the command line, which therefore win."""

from pathlib import Path
from typing import Any

from ..checkpoint.bounded import read_regular
from ..checkpoint.facts import DEEPEST, check_plain
from .config.compose import Arguments, check_arguments
from .config.config import Config, ConfigError, Shape
from .config.group_words import composed_leaves
from .config.overrides import parse_override, split_override
from .config.redact import PLACEHOLDER
from .config.schema import quoted, written
from .config.serialize import config_from_plain, leaves, plain_config
from .learning_rate import learning_rate_factor

CONFIG = "config.yaml"
LARGEST_CONFIG = 1 << 16
"""Limit for the bytes of config.yaml; a run writes some thousand."""
DECAY_FROM = "schedule.decay_from"
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
    default, base = (composed_leaves(arguments, overrides) for overrides in ([], fixed))
    replaced = {key for key in keys if key in groups}
    if "checkpoint.init" in keys:
        replaced |= {"model", "tokenizer"}  # which the new source gives
    run = {} if arguments.multirun else {"run.dir": str(folder)}  # the points of a sweep have folders of their own
    decay_from = [
        parse_override(text, groups).value() for text, key in zip(arguments.overrides, keys, strict=True) if key == DECAY_FROM
    ]
    if decay_from and isinstance(decay_from[-1], int):
        run = {key: value for key, value in decay_branch(saved, folder, decay_from[-1]).items() if key not in keys}
    added = []
    for key, value in leaves(plain_config(saved)):
        if key in (*LEFT_OUT, *keys, *run) or key.split(".")[0] in replaced or base[key] != default[key]:
            continue
        of_source = saved.checkpoint.init is not None and key.startswith(("model.", "tokenizer."))
        if of_source or value != base[key]:  # a source has other values than `base`
            if PLACEHOLDER.search(str(value)):
                rule = f"is without its secrets in {folder / CONFIG}"
                raise ConfigError.of(key, value, rule, f"{key}=... beside --from {folder}, with them")
            added.append(f"{key}={_text(value)}")
    added += [f"{key}={_text(value)}" for key, value in run.items()]
    return Arguments(**{**vars(arguments), "overrides": [*added, *arguments.overrides], "from_run": None})


def decay_branch(saved: Config, folder: Path, step: int) -> dict[str, Any]:
    """Returns the settings of a run that decays the learning rate from the checkpoint of `step` of the run in `folder` on.

    Raises ConfigError, one line, if there is no such checkpoint, or if the rate was not stable there.
    """
    from ..checkpoint.folder import checkpoints_in, step_of

    schedule, steps = saved.schedule, [step_of(path) for path in checkpoints_in(folder / "checkpoints")]
    if schedule.shape not in (Shape.wsd, Shape.constant):
        rule = f"branches off a stable learning rate, and {folder} has schedule.shape={schedule.shape.value}"
        raise ConfigError.of(DECAY_FROM, step, rule, f"{DECAY_FROM}=null, or a run with schedule=wsd or constant")
    if learning_rate_factor(saved, step) != 1:
        raise ConfigError.of(DECAY_FROM, step, f"is in the warm-up or the decay of {folder}", "a step of its stable part")
    if step not in steps:
        near = min(steps, key=lambda found: abs(found - step), default=None)
        raise ConfigError.of(DECAY_FROM, step, f"is a step of which {folder} has no checkpoint", f"{DECAY_FROM}={near}")
    branch = folder.with_name(f"{folder.name}_decay_{step}")
    started = bool(checkpoints_in(branch / "checkpoints"))
    resume = "auto" if started else str(folder / "checkpoints" / f"step_{step:08d}")
    wsd = {"schedule.shape": "wsd", "schedule.decay": None, "steps": -(-step * 5 // 4)}
    return {**wsd, "checkpoint.resume": resume, "run.dir": str(branch)}


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
