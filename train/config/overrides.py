"""Checks overrides one by one before Hydra composes them, so that an error names what was typed."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ConfigError
from .gpus import CATALOGUE
from .schema import (
    in_mapping,
    is_mapping,
    nearest_text,
    quoted,
    settings,
    structured,
    suggest,
    unknown_key_error,
    written,
    wrong_value_error,
)

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

Groups = dict[str, list[str]]
"""The options of each Hydra group."""


def check_overrides(overrides: list[str], groups: Groups, sweep: bool = False) -> None:
    """Raises ConfigError for the first override with an unknown key, a value of the wrong type, or a `_target_`.

    Several values of one key are refused, or with `sweep` checked one by one.
    """
    schema = structured()
    for text in overrides:
        override = parse_override(text, groups)
        if override.is_sweep_override() and not sweep:
            raise ConfigError.of(*split_override(text), "several values are a sweep", f"tokenyard train -m {text}")
        for value in _values(override, groups):
            _check(schema, groups, override, value)


def parse_override(text: str, groups: Groups) -> "Override":
    """Parses one `key=value` with Hydra. Raises ConfigError if it is none, or holds a `_target_`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, value = split_override(text)
    if "_target_" in text:
        raise target_error(key, value, groups)
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        if "=" not in text:
            raise ConfigError(f"{text}: is not key=value; nearest valid: {suggest(key, value, groups)}") from error
        if key not in settings():
            raise unknown_key_error(key, value, groups) from error
        raise ConfigError.of(key, value, "cannot be read as a value", f"{key}={quoted(value)}") from error


def check_composed(node: Any, groups: Groups, prefix: str = "") -> None:
    """Raises ConfigError for a `_target_` anywhere in composed values, and for the first key that is no setting."""
    if isinstance(node, list):
        for item in node:
            check_composed(item, groups, prefix)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key == "_target_":
            raise target_error(f"{prefix}{key}", value, groups)
        if f"{prefix}{key}" not in settings() and not in_mapping(f"{prefix}{key}"):
            raise unknown_key_error(f"{prefix}{key}", value, groups)
        check_composed(value, groups, f"{prefix}{key}.")


def find_groups(folders: Iterable[Path]) -> Groups:
    """Returns all groups (folders) and their options (files) in `folders`. The catalogue of GPUs is no group of a run."""
    groups: Groups = {}
    paths = sorted(path for folder in folders for path in folder.glob("*/*.yaml"))
    for path in (path for path in paths if path.parent != CATALOGUE):
        groups.setdefault(path.parent.name, []).append(path.stem)
    return groups


def target_error(key: str, value: object, groups: Groups) -> ConfigError:
    """Returns the error for a `_target_`, which would make Hydra call what it names."""
    group = key.lstrip("+~").partition(".")[0]
    nearest = f"{group}={groups[group][0]}" if group in groups else "leave it out"
    return ConfigError.of(key, value, "no configuration may hold a _target_, parts are chosen by name", nearest)


def split_override(text: str) -> tuple[str, str]:
    """Returns the key and value of an override as typed; the value is empty without `=`."""
    key, _, value = text.partition("=")
    return key, value


def as_hydra_override(text: str) -> str:
    """Returns the override as Hydra accepts it: a key inside a mapping needs `++`, which lets Hydra add keys."""
    key = split_override(text)[0]
    return f"++{text}" if is_mapping(key) or in_mapping(key) else text


def _check(schema: Any, groups: Groups, override: "Override", value: Any) -> None:
    key, typed = override.key_or_group, split_override(override.input_line or "")[1]
    if key.startswith(("hydra.", "hydra/")):
        return
    if in_mapping(key) and override.package is None and not override.is_delete():
        return
    if override.package is not None or not (key in groups or key in settings()):
        raise unknown_key_error(override.get_key_element().lstrip("+~"), typed, groups)
    if override.is_add():
        raise ConfigError(f"+{key}={typed}: it is there already; nearest valid: {key}={typed}")
    if key in groups and not isinstance(value, dict):
        _check_option(override, value, groups[key])
    elif override.is_delete():
        raise ConfigError(f"~{key}: a setting cannot be deleted; nearest valid: leave it out")
    else:
        _check_value(schema, key, value, typed)


def _check_option(override: "Override", value: Any, options: list[str]) -> None:
    """Checks an option of a group, or a list of them, which are merged in order."""
    for option in [] if override.is_delete() else value if isinstance(value, list) else [value]:
        if option not in options:
            key, text = override.key_or_group, written(option)
            raise ConfigError.of(key, text, f"must be one of {', '.join(options)}", f"{key}={nearest_text(text, options)}")


def _check_value(schema: Any, key: str, value: Any, typed: str) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        if isinstance(value, dict):
            check_composed(value, {}, f"{key}.")
        OmegaConf.update(schema, key, value)
    except OmegaConfBaseException as error:
        if not isinstance(value, dict) or error.full_key in (None, key):
            raise wrong_value_error(key, typed) from error
        raise wrong_value_error(error.full_key, error.value) from error


def _values(override: "Override", groups: Groups) -> Iterator[Any]:
    """Yields the values of an override: one, or each of a sweep over a list; none for a range, which needs no check.

    Raises ConfigError for a glob that matches no option, or is for a setting, which has none.
    """
    from hydra.core.override_parser.types import Glob, Transformer

    if not override.is_sweep_override():
        yield override.value()
    elif isinstance(glob := override.value(), Glob):
        key, text = split_override(override.input_line or "")
        if key not in groups:
            raise ConfigError.of(key, text, f"a glob chooses options of a group: {', '.join(groups)}", "write the values: key=a,b")
        if not glob.filter(groups[key]):
            raise ConfigError.of(key, text, f"matches none of {', '.join(groups[key])}", f"{key}=glob(*)")
    elif override.is_choice_sweep():
        yield from override.sweep_iterator(transformer=Transformer.identity)
