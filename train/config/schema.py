"""What the configuration's settings are called and may hold, read from the dataclasses: for messages about the wrong ones."""

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

REMOVED = {
    "tracker.entity": ("W&B reads it from the environment", "WANDB_ENTITY={value} in the environment"),
    "tracker.group": ("W&B and trackio take it from the environment", "WANDB_RUN_GROUP={value} in the environment"),
    "tracker.tags": ("W&B reads them from the environment", "WANDB_TAGS={value} in the environment"),
    "tracker.job_type": ("W&B reads it from the environment", "WANDB_JOB_TYPE={value} in the environment"),
    "telemetry.probe_every": ("the probe runs at each evaluation", "evaluate.every={value}"),
    "log.layers_every": ("the table of the layers is printed after each evaluation", "evaluate.every={value}"),
}
"""Settings of earlier versions: why each is gone, and what to write instead. Checkpoints that have them still load."""

UNADMITTED = (TypeError, ValueError, OverflowError, LookupError)
"""What `converted` raises."""


def refuse_key(key: str, value: object, groups: Mapping[str, list[str]]) -> ConfigError:
    """The error for a `key` that is no setting; `groups` (with their options) are keys that may be meant as well."""
    if key in REMOVED:
        reason, instead = REMOVED[key]
        nearest = instead.format(value=str(value).strip("[]"))
        return ConfigError.of(key, value, f"there is no such setting any more, {reason}", nearest)
    section = key.rpartition(".")[0]
    rule = f"there is no such setting in `{section}`" if section else "there is no such setting"
    return ConfigError.of(key, value, rule, suggest(key, value, groups))


def suggest(key: str, value: object, groups: Mapping[str, list[str]]) -> str:
    """The override that is most likely meant: the nearest key, with `value` where it may have it."""
    leaves = [name for name, (kind, _) in settings().items() if not dataclasses.is_dataclass(kind)]
    meant = nearest_key(key.partition("@")[0], [*leaves, *groups])
    if meant in groups:
        return f"{meant}={nearest_text(str(value), groups[meant])}"
    return f"{meant}={value if admits(meant, value) else written(attrgetter(meant)(Config()))}"


def refuse_value(key: str, value: object) -> ConfigError:
    """The error for a `value` that the type of the setting `key` does not admit."""
    kind, optional = settings()[key]
    default = attrgetter(key)(Config())
    if dataclasses.is_dataclass(kind):
        first = dataclasses.fields(kind)[0].name
        return ConfigError.of(key, value, "is a section, not a setting", f"{key}.{first}={written(getattr(default, first))}")
    rule, nearest = _rule_and_nearest(kind, value, default)
    return ConfigError.of(key, written(value), f"must be {rule}{' or null' if optional else ''}", f"{key}={written(nearest)}")


def admits(key: str, value: object) -> bool:
    """Whether the type of the setting `key` takes `value`, in the spelling of an override or as a Python object."""
    try:
        converted(key, value)
    except UNADMITTED:
        return False
    return value != ""


def converted(key: str, value: Any) -> Any:
    """`value` as the setting `key` holds it: an enumeration by its name, a number also by its text, a text also by a number.

    One of UNADMITTED for a value that the setting's type does not admit.
    """
    kind, optional = settings()[key]
    return None if value is None and optional else _converted(kind, value)


def in_mapping(key: str) -> bool:
    """Whether the key lies inside of such a setting."""
    above = [key[:end] for end, letter in enumerate(key) if letter == "."]
    return any(is_mapping(name) for name in above)


def is_mapping(key: str) -> bool:
    """Whether the setting is a mapping whose keys are not ours."""
    return key in settings() and typing.get_origin(settings()[key][0]) is dict


@functools.cache
def settings() -> dict[str, tuple[type, bool]]:
    """Each setting and section by its dotted key, with its type and whether it may be null."""
    return dict(_walk(Config, ""))


def structured() -> typing.Any:
    """OmegaConf's node of a Config, to be changed by the caller. A copy: from the dataclasses it takes five times as long."""
    return copy.deepcopy(_structured())


@functools.cache
def _structured() -> typing.Any:
    from omegaconf import OmegaConf

    return OmegaConf.structured(Config)


def nearest_key(key: str, known: Iterable[str]) -> str:
    """The known key that `key` most likely means: alike as a whole, or in its last part (`lr` for `optimizer.lr`)."""

    def likeness(candidate: str) -> float:
        return max(alike(key, candidate), 0.9 * alike(key.rpartition(".")[2], candidate.rpartition(".")[2]))

    return max(known, key=likeness)


def nearest_text(text: str, known: Iterable[str]) -> str:
    """The known word that is most like `text`."""
    return max(known, key=functools.partial(alike, text.lower()))


def alike(one: str, other: str) -> float:
    """From 0 (no letter in common) to 1 (equal)."""
    return SequenceMatcher(None, one, other).ratio()


def written(value: object) -> str:
    """A value as one writes it in an override."""
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
    """Text as Hydra's grammar reads it back unchanged, whatever is in it."""
    # There a backslash escapes only in front of a quote or of the closing quote; elsewhere it is an ordinary character.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"


def _walk(cls: type, prefix: str) -> Iterator[tuple[str, tuple[type, bool]]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, optional = _without_none(hints[field.name])
        yield prefix + field.name, (kind, optional)
        if dataclasses.is_dataclass(kind):
            yield from _walk(kind, f"{prefix}{field.name}.")


def _without_none(hint: typing.Any) -> tuple[type, bool]:
    """`int | None` is (int, True)."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not types.NoneType), True
    return hint, False


def _converted(kind: Any, value: Any) -> Any:
    match typing.get_origin(kind) or kind, value:
        case (builtins.list, list()):
            return [_converted(typing.get_args(kind)[0], item) for item in value]
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
    """The integer nearest to `value`, where that is a number."""
    try:
        number = float(str(value))
    except ValueError:
        return default
    return round(number) if math.isfinite(number) else default
