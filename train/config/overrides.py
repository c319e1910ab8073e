"""Checks overrides one by one before Hydra composes them, so that an error is about what was typed."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ConfigError
from .schema import in_mapping, is_mapping, nearest_text, quoted, refuse_key, refuse_value, settings, structured, suggest, written

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

Groups = dict[str, list[str]]
"""The options of each Hydra group."""


def check_overrides(overrides: list[str], groups: Groups, sweep: bool = False) -> None:
    """ConfigError for the first override that names no setting, has a value of the wrong type, or holds a `_target_`.

    With `sweep` several values of one key are checked one by one; without they are refused.
    """
    schema = structured()
    for text in overrides:
        override = parse_override(text, groups)
        if override.is_sweep_override() and not sweep:
            raise ConfigError.of(*halves(text), "several values are a sweep", f"tokenyard train -m {text}")
        for value in _values(override):
            _check(schema, groups, override, value)


def parse_override(text: str, groups: Groups) -> "Override":
    """One `key=value` as Hydra reads it. ConfigError if it is none, or holds a `_target_`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, value = halves(text)
    if "_target_" in text:
        raise refuse_target(key, value, groups)
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        if "=" not in text:
            raise ConfigError(f"{text}: is not key=value; nearest valid: {suggest(key, value, groups)}") from error
        if key not in settings():
            raise refuse_key(key, value, groups) from error
        raise ConfigError.of(key, value, "cannot be read as a value", f"{key}={quoted(value)}") from error


def check_composed(node: Any, groups: Groups, prefix: str = "") -> None:
    """ConfigError for a `_target_` anywhere in composed values, and for the first key that is no setting."""
    if isinstance(node, list):
        for item in node:
            check_composed(item, groups, prefix)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key == "_target_":
            raise refuse_target(f"{prefix}{key}", value, groups)
        if f"{prefix}{key}" not in settings() and not in_mapping(f"{prefix}{key}"):
            raise refuse_key(f"{prefix}{key}", value, groups)
        check_composed(value, groups, f"{prefix}{key}.")


def find_groups(folders: Iterable[Path]) -> Groups:
    """The groups are the folders, their options the files, in all of `folders` together."""
    groups: Groups = {}
    for path in sorted(path for folder in folders for path in folder.glob("*/*.yaml")):
        groups.setdefault(path.parent.name, []).append(path.stem)
    return groups


def refuse_target(key: str, value: object, groups: Groups) -> ConfigError:
    """The error for a `_target_`: Hydra would call whatever it names."""
    group = key.lstrip("+~").partition(".")[0]
    nearest = f"{group}={groups[group][0]}" if group in groups else "leave it out"
    return ConfigError.of(key, value, "no configuration may hold a _target_, parts are chosen by name", nearest)


def halves(text: str) -> tuple[str, str]:
    """Key and value as they were typed."""
    key, _, value = text.partition("=")
    return key, value


def forced(text: str) -> str:
    """The override of a mapping, or inside of one, as Hydra takes it: it adds keys only where it is told to."""
    key = halves(text)[0]
    return f"++{text}" if is_mapping(key) or in_mapping(key) else text


def _check(schema: Any, groups: Groups, override: "Override", value: Any) -> None:
    key, typed = override.key_or_group, halves(override.input_line or "")[1]
    if key.startswith(("hydra.", "hydra/")):
        return
    if in_mapping(key) and override.package is None and not override.is_delete():
        return
    if override.package is not None or not (key in groups or key in settings()):
        raise refuse_key(override.get_key_element().lstrip("+~"), typed, groups)
    if override.is_add():
        raise ConfigError(f"+{key}={typed}: it is there already; nearest valid: {key}={typed}")
    if key in groups and not isinstance(value, dict):
        _check_option(override, value, groups[key])
    elif override.is_delete():
        raise ConfigError(f"~{key}: a setting cannot be deleted; nearest valid: leave it out")
    else:
        _check_value(schema, key, value, typed)


def _check_option(override: "Override", value: Any, options: list[str]) -> None:
    """An option of a group, or a list of them to be laid over one another."""
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
            raise refuse_value(key, typed) from error
        raise refuse_value(error.full_key, error.value) from error


def _values(override: "Override") -> Iterator[Any]:
    """Each value of a sweep over listed values, none of a range, else the one value."""
    from hydra.core.override_parser.types import Transformer

    if not override.is_sweep_override():
        yield override.value()
    elif override.is_choice_sweep():
        yield from override.sweep_iterator(transformer=Transformer.identity)
