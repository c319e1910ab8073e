"""Keys, types and defaults of all settings, read from the dataclasses, and errors about wrong keys and values."""

import builtins
import copy
import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from enum import Enum, EnumType
from operator import attrgetter
from typing import Any

from .config import Config, ConfigError
from .usual_names import usual_name

REMOVED = {
    "tracker.entity": ("W&B reads it from the environment", "WANDB_ENTITY={value} in the environment"),
    "tracker.group": ("W&B and trackio take it from the environment", "WANDB_RUN_GROUP={value} in the environment"),
    "tracker.tags": ("W&B reads them from the environment", "WANDB_TAGS={value} in the environment"),
    "tracker.job_type": ("W&B reads it from the environment", "WANDB_JOB_TYPE={value} in the environment"),
    "telemetry.probe_every": ("the probe runs at each evaluation", "evaluate.every={value}"),
    "log.layers_every": ("the table of the layers is printed after each evaluation", "evaluate.every={value}"),
}
"""Settings of earlier versions: why each is gone, and what to write instead. Checkpoints that have them still load."""

FORMER_VALUES = {"parallel.recompute": {"true": "block", "false": "none"}}
"""Values of settings in earlier versions, and what they are called now. They are read as what they are called now."""

CONVERSION_ERRORS = (TypeError, ValueError, OverflowError, LookupError)
"""The exceptions of `convert`."""


def unknown_key_error(key: str, value: object, groups: Mapping[str, list[str]]) -> ConfigError:
    """Returns the error for a `key` that is no setting. `groups`, with their options, are valid keys too."""
    if key in REMOVED:
        reason, instead = REMOVED[key]
        nearest = instead.format(value=str(value).strip("[]"))
        return ConfigError.of(key, value, f"there is no such setting any more, {reason}", nearest)
    section = key.rpartition(".")[0]
    rule = f"there is no such setting in `{section}`" if section else "there is no such setting"
    return ConfigError.of(key, value, rule, suggest(key, value, groups))


def suggest(key: str, value: object, groups: Mapping[str, list[str]]) -> str:
    """Returns the valid override that is meant: by the field's usual names, else by likeness; with `value` if that is valid."""
    usual = usual_name(key.partition("@")[0])
    if usual is not None and "=" in usual.rstrip("="):
        return usual.format(value=value if accepts("launch.ranks", value) else 2)
    if usual is not None and not usual.endswith("=") and accepts(usual, value):
        return f"{usual}={value}"
    if usual is not None:
        return f"{usual.rstrip('=')}={written(attrgetter(usual.rstrip('='))(Config()))}"
    leaves = [name for name, (kind, _) in settings().items() if not dataclasses.is_dataclass(kind)]
    meant = nearest_key(key.partition("@")[0], [*leaves, *groups])
    if meant in groups:
        return f"{meant}={nearest_text(str(value), groups[meant])}"
    return f"{meant}={value if accepts(meant, value) else written(attrgetter(meant)(Config()))}"


def wrong_value_error(key: str, value: object) -> ConfigError:
    """Returns the error for a `value` of the wrong type for the setting `key`."""
    kind, optional = settings()[key]
    default = attrgetter(key)(Config())
    if dataclasses.is_dataclass(kind):
        first = dataclasses.fields(kind)[0].name
        return ConfigError.of(key, value, "is a section, not a setting", f"{key}.{first}={written(getattr(default, first))}")
    rule, nearest = _rule_and_nearest(kind, todays_value(key, value), default)
    return ConfigError.of(key, written(value), f"must be {rule}{' or null' if optional else ''}", f"{key}={written(nearest)}")


def accepts(key: str, value: object) -> bool:
    """Whether `value`, as text of an override or as a Python object, has the type of the setting `key`."""
    try:
        convert(key, value)
    except CONVERSION_ERRORS:
        return False
    return value != ""


def convert(key: str, value: Any) -> Any:
    """Converts `value` to the type of the setting `key`: names to enumerations, text to numbers, numbers to text.

    Raises one of CONVERSION_ERRORS if that is not possible.
    """
    kind, optional = settings()[key]
    return None if value is None and optional else _convert(kind, todays_value(key, value))


def todays_value(key: str, value: Any) -> Any:
    """Returns what a value of an earlier version is called now, or the value itself."""
    return FORMER_VALUES.get(key, {}).get(written(value).lower(), value)


def in_mapping(key: str) -> bool:
    """Whether the key lies inside a setting for which `is_mapping` is true."""
    parents = [key[:end] for end, letter in enumerate(key) if letter == "."]
    return any(is_mapping(parent) for parent in parents)


def is_mapping(key: str) -> bool:
    """Whether the setting is a mapping with arbitrary keys, such as engine.extra."""
    return key in settings() and typing.get_origin(settings()[key][0]) is dict


@functools.cache
def settings() -> dict[str, tuple[type, bool]]:
    """Returns all settings and sections by dotted key, with their type and whether they may be null."""
    return dict(_walk(Config, ""))


def structured() -> typing.Any:
    """OmegaConf's node of a Config, for the caller to change. A copy is five times as fast as a conversion of the dataclasses."""
    return copy.deepcopy(_structured())


@functools.cache
def _structured() -> typing.Any:
    from omegaconf import OmegaConf

    return OmegaConf.structured(Config)


def nearest_key(key: str, known: Iterable[str]) -> str:
    """Returns the most similar known key, as a whole or in its last part (`lr` for `optimizer.lr`)."""

    def of_key(candidate: str) -> float:
        return max(similarity(key, candidate), 0.9 * similarity(key.rpartition(".")[2], candidate.rpartition(".")[2]))

    return max(known, key=of_key)


def nearest_text(text: str, known: Iterable[str]) -> str:
    """Returns the most similar known word."""
    return max(known, key=functools.partial(similarity, text.lower()))


def similarity(one: str, other: str) -> float:
    """From 0 (no letter in common) to 1 (equal)."""
    return SequenceMatcher(None, one, other).ratio()


def written(value: object) -> str:
    """Returns a value as text of an override."""
    match value:
        case Enum():
            return value.name
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case list():
            return f"[{','.join(written(item) for item in value)}]"
        case dict():
            return f"{{{','.join(f'{key}:{written(item)}' for key, item in value.items())}}}"
        case _:
            return str(value)


def quoted(text: str) -> str:
    """Returns any text, quoted so that Hydra's grammar reads it back unchanged."""
    # In that grammar a backslash escapes only before a quote or the closing quote; elsewhere it is an ordinary character.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"


def _walk(cls: type, prefix: str) -> Iterator[tuple[str, tuple[type, bool]]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        optional = isinstance(hint, types.UnionType)  # with None
        kind: type = next(each for each in typing.get_args(hint) if each is not types.NoneType) if optional else hint
        yield prefix + field.name, (kind, optional)
        if dataclasses.is_dataclass(kind):
            yield from _walk(kind, f"{prefix}{field.name}.")


def _convert(kind: Any, value: Any) -> Any:
    match typing.get_origin(kind) or kind, value:
        case (builtins.list, list()):
            return [_convert(typing.get_args(kind)[0], item) for item in value]
        case (builtins.dict, dict()) if all(isinstance(key, str) for key in value):
            return dict(value)
        case (builtins.bool, bool()):
            return value
        case (builtins.bool, str()):
            return {"true": True, "false": False}[value.lower()]
        case (builtins.int, int() | str()) if not isinstance(value, bool):
            return int(value)
        case (builtins.float, int() | float() | str()) if not isinstance(value, bool):
            return float(value)
        case (builtins.str, str() | int() | float()):
            return str(value)
        case (EnumType(), str()):
            return kind[value]
        case _:
            raise TypeError(f"{value!r} is no {kind}")


def _rule_and_nearest(kind: type, value: object, default: object) -> tuple[str, object]:
    if issubclass(typing.get_origin(kind) or kind, list):
        return "a list, [a,b]", [value] if isinstance(value, str) and not value.startswith("[") else default
    if typing.get_origin(kind) is dict:
        return "a mapping, {key:value}", default
    if issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}", nearest_text(str(value), kind.__members__)
    if kind is bool:
        return "true or false", nearest_text(str(value), ["true", "false"])
    if kind is int:
        return "an integer", _rounded(value, default)
    return ("a number" if kind is float else "text"), default


def _rounded(value: object, default: object) -> object:
    """Returns the integer nearest to `value`; `default` if that is no finite number."""
    try:
        number = float(str(value))
    except ValueError:
        return default
    return round(number) if math.isfinite(number) else default
