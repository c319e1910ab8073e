"""Where a number of the configuration must lie: each range is declared beside its setting, in the metadata of its field."""

import dataclasses
import functools
import types
import typing


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


def inside(value: float, interval: str) -> bool:
    """Whether `value` lies in `interval`; ( and ) exclude the bound."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    return (low <= value if interval[0] == "[" else low < value) and (value <= high if interval[-1] == "]" else value < high)
