"""Converts a Config to plain values, for config.yaml, checkpoints and trackers, and back, checked against the schema."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from .config import Config, ConfigError
from .own_files import write_whole
from .redact import redact_plain
from .schema import CONVERSION_ERRORS, REMOVED, convert, is_mapping, unknown_key_error, written, wrong_value_error


def plain_config(config: Any) -> dict[str, Any]:
    """Returns a Config, or a section of one, as nested mappings of numbers, strings and lists. Enumerations become their names."""
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def shown_config(config: Config) -> dict[str, Any]:
    """Returns `plain_config` without secrets, for files, trackers and people."""
    return redact_plain(plain_config(config))


def config_from_plain(plain: dict[str, Any], overrides: list[str] | None = None) -> Config:
    """Returns the Config of what `plain_config` gave, changed by `key=value` overrides. Left-out settings have their defaults.

    Settings that an earlier version had are skipped. Raises ConfigError for an unknown key or a value of the wrong type. Imports
    OmegaConf only if there are overrides.
    """
    refuse_code(plain)
    config = Config()
    _fill(config, _overridden(plain, overrides) if overrides else plain)
    return config


def _overridden(plain: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for key, _, value in (text.partition("=") for text in overrides):
        if key in REMOVED:
            raise unknown_key_error(key, value, {})
        section: Any = Config()
        for name in key.split("."):
            section = getattr(section, name, None)
        if is_dataclass(section):
            rule = "must name one setting, options of a group are read where a run starts"
            raise ConfigError.of(key, value, rule, f"{key}.{fields(section)[0].name}=VALUE")
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(plain, OmegaConf.from_dotlist(overrides)), resolve=True)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        raise ConfigError((str(error).splitlines() or [type(error).__name__])[0][:400]) from error
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def _fill(section: Any, plain: dict[str, Any], prefix: str = "") -> None:
    for name, value in plain.items():
        key = f"{prefix}{name}"
        if key in REMOVED:
            continue
        if name not in vars(section):
            raise unknown_key_error(_short(key), _short(value), {})
        if is_dataclass(present := getattr(section, name)) and isinstance(value, dict):
            _fill(present, value, f"{key}.")
            continue
        try:
            setattr(section, name, convert(key, value))
        except CONVERSION_ERRORS as error:
            raise wrong_value_error(key, _short(value)) from error


def _short(value: Any) -> str:
    text = written(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _plain(value: Any) -> Any:
    match value:
        case Enum():
            return value.name
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case _:
            return plain_config(value) if is_dataclass(value) else value


def refuse_code(plain: Any) -> None:
    """Raises ConfigError for a `_target_`, which Hydra would call, and for `${...}`, which OmegaConf would replace."""
    if isinstance(plain, dict):
        if "_target_" in plain:
            raise ConfigError("_target_: a configuration that is read may not hold one; it is of no use here")
        for value in plain.values():
            refuse_code(value)
    elif isinstance(plain, list):
        for value in plain:
            refuse_code(value)
    elif isinstance(plain, str) and "${" in plain:
        raise ConfigError(f"{plain[:40]}: a configuration that is read may not hold ${{...}}; it is of no use here")


def write_config(config: Config, path: Path) -> None:
    """Writes the configuration as YAML, without secrets."""
    from omegaconf import OmegaConf

    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(shown_config(config))))


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each setting of a plain configuration with its dotted key."""
    for key, value in node.items():
        if isinstance(value, dict) and not is_mapping(f"{prefix}{key}"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
