"""What the fields of a configuration take: values of their annotated kinds, and numbers in the range declared in their metadata."""

import builtins
import contextlib
import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Iterator
from enum import EnumType
from operator import attrgetter


def within(interval: str) -> dict[str, str]:
    """Returns metadata of a field whose number must lie in `interval`, such as "[0, 1)", unless it is null."""
    return {"within": interval}


@functools.cache
def ranges(cls: type, prefix: str = "") -> dict[str, str]:
    """Returns the interval of each number of a dataclass and of the dataclasses in it, by dotted key behind `prefix`."""
    found: dict[str, str] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "within" in field.metadata:
            found[prefix + field.name] = field.metadata["within"]
        for kind in typing.get_args(hints[field.name]) if isinstance(hints[field.name], types.UnionType) else [hints[field.name]]:
            if dataclasses.is_dataclass(kind) and isinstance(kind, type):
                found |= ranges(kind, f"{prefix}{field.name}.")
    return found


def bounds(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)


def inside(value: float, interval: str) -> bool:
    """Whether `value` lies in `interval`; ( and ) exclude the bound."""
    low, high = bounds(interval)
    return (low <= value if interval[0] == "[" else low < value) and (value <= high if interval[-1] == "]" else value < high)


def outside(section: typing.Any) -> Iterator[tuple[str, float, str]]:
    """Yields key, value and interval of each number of a dataclass, and of those in it, that is outside its range."""
    for key, interval in ranges(type(section)).items():
        value = attrgetter(key)(section)
        if value is not None and not inside(value, interval):
            yield key, value, interval


def check_ranges(section: typing.Any, owner: str = "") -> None:
    """Raises ValueError, one line, for the first number of a dataclass, and of those in it, outside its range."""
    for key, value, interval in outside(section):
        within = [type(value)(bound) for bound in bounds(interval) if math.isfinite(bound) and inside(bound, interval)]
        nearest = min(within, key=lambda bound: abs(bound - value), default=attrgetter(key)(type(section)()))
        raise ValueError(f"{owner and owner + '.'}{key}={value}: must be in {interval}; nearest valid: {key}={nearest}")


def check_kinds(section: typing.Any, owner: str = "") -> None:
    """A `__post_init__`: replaces names of enumerations' members by these, and refuses a value of another kind than its field's.

    Raises ValueError, one line, about a field of `owner`, which is the dataclass by default.
    """
    for name, hint in _hints(type(section)).items():
        value = getattr(section, name)
        try:
            setattr(section, name, _of_kind(hint, value))
        except (TypeError, LookupError, OverflowError):
            field = type(section).__dataclass_fields__[name]
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            rule, nearest = _rule_and_nearest(hint, value, default)
            key, said = f"{owner or type(section).__name__}.{name}", " ".join(repr(value).split())[:60]
            raise ValueError(f"{key}={said}: must be {rule}; nearest valid: {name}={nearest}") from None


_hints = functools.cache(typing.get_type_hints)


def _without_none(hint: typing.Any) -> typing.Any:
    if not isinstance(hint, types.UnionType):
        return hint
    return next(each for each in typing.get_args(hint) if each is not types.NoneType)


def _of_kind(hint: typing.Any, value: typing.Any) -> typing.Any:
    """Returns `value`, as a member of an enumeration if it names one, or as Python's own number. Raises for one of another kind."""
    kind = _without_none(hint)
    if value is None and kind is not hint:
        return None
    match typing.get_origin(kind) or kind:
        case builtins.list if isinstance(value, list | tuple):
            return [_of_kind(typing.get_args(kind)[0], item) for item in value]
        case builtins.int if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return int(value)
        case builtins.float if isinstance(value, numbers.Real) and not isinstance(value, bool):
            return float(value)
        case EnumType() if isinstance(value, str):
            return kind[value]
        case known if known not in (int, float, list) and isinstance(value, known):
            return value
    raise TypeError(kind)


def _rule_and_nearest(hint: typing.Any, value: typing.Any, default: typing.Any) -> tuple[str, str]:
    from difflib import SequenceMatcher

    kind, nearest = _without_none(hint), repr(default)
    words = {bool: "True or False", int: "an integer", float: "a number", str: "text"}
    name = words.get(kind) or f"an object of {getattr(kind, '__name__', kind)}"
    if typing.get_origin(kind) is list:
        name = f"a list, each item {words[typing.get_args(kind)[0]]}"
    elif isinstance(kind, EnumType):
        members = list(kind.__members__)
        name = f"one of {', '.join(members)}"
        nearest = repr(max(members, key=lambda member: SequenceMatcher(None, str(value).lower(), member).ratio()))
    elif dataclasses.is_dataclass(kind):
        given = value if isinstance(value, dict) else {}
        nearest = f"{getattr(kind, '__name__', kind)}({', '.join(f'{key}={item!r}' for key, item in given.items())})"
    elif kind in (int, float):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            nearest = repr(round(float(value)) if kind is int else float(value))
    return f"{name}{'' if kind is hint else ' or None'}", nearest
