"""Reads config.json key by key. Every key is read, known not to matter, or refused with its name and value."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..checkpoint.bounded import brief, short_message

MOST = 1 << 40
"""Upper bound of a whole number."""


class ConfigReader:
    """The values of one JSON object, with `defaults` for the keys that it leaves out; records which keys were read.

    Each error is a ValueError of one line that begins with `place`: `config.json: hidden_act='gelu': must be 'silu'`.
    """

    def __init__(self, given: dict[str, Any], defaults: dict[str, Any], place: str) -> None:
        self._given = given
        self._values = defaults | given
        self.place = place
        self._read: set[str] = set()

    def given(self, key: str) -> bool:
        """Whether the file itself has the key."""
        return key in self._given

    def any(self, key: str) -> Any:
        """The value, unchecked; None if there is none."""
        self._read.add(key)
        return self._values.get(key)

    def integer(self, key: str, least: int = 1) -> int:
        value = self.any(key)
        if type(value) is not int or not least <= value < MOST:
            raise self.wrong(key, f"must be a whole number of at least {least} and below 2^40")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.any(key) is None else self.integer(key)

    def number(self, key: str) -> float:
        value = self.any(key)
        if type(value) not in (int, float) or not abs(value) < math.inf or abs(value) >= 1 << 100:
            raise self.wrong(key, "must be a number below 2^100")
        return float(value)

    def positive(self, key: str) -> float:
        """A number above 0."""
        if (value := self.number(key)) <= 0:
            raise self.wrong(key, "must be above 0")
        return value

    def flag(self, key: str) -> bool:
        """A boolean; null is false."""
        value = self.any(key)
        if value is not None and type(value) is not bool:
            raise self.wrong(key, "must be true or false")
        return bool(value)

    def mapping(self, key: str) -> dict[str, Any]:
        """A JSON object; null is an empty one."""
        value = self.any(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "must be an object")
        return dict(value or {})

    def require(self, key: str, *allowed: Any, why: str = "") -> None:
        """Raises unless the value is in `allowed`, the only ones that ModelConfig can express."""
        if self.any(key) not in allowed:
            raise self.wrong(key, f"must be {' or '.join(map(repr, allowed))}{', ' if why else ''}{why}")

    def finish(self, irrelevant: Iterable[str], harmless: Mapping[str, tuple[Any, ...]]) -> None:
        """Raises for the first key of the file that was not read, is not in `irrelevant` and has no value of `harmless`."""
        for key, value in self._given.items():
            if key in self._read or key in irrelevant or value in harmless.get(key, ()):
                continue
            rule = f"must be {' or '.join(map(repr, harmless[key]))}" if key in harmless else "is not supported"
            raise self.wrong(key, rule)

    def wrong(self, key: str, rule: str) -> ValueError:
        """The error about `key`, to be raised."""
        return ValueError(f"{self.place}{short_message(key)}={brief(self._values.get(key))}: {rule}")
