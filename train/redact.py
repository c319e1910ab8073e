"""Secrets, found by name and by value, are in nothing that is printed, saved or sent."""

import functools
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

VARIABLE = re.compile(r".*(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)S?", re.IGNORECASE)
KEY = re.compile(r"(.*[_-])?(api_?key|key|token|secret|password|passwd|credentials?)", re.IGNORECASE)
SHORTEST = 8
"""Characters. A shorter value may stand anywhere by chance."""


def redact(text: str) -> str:
    """`text` with the names of secrets, in angle brackets, where their values were."""
    return _without(text, _secrets(_environment()))


def redact_plain(value: Any, key: str = "") -> Any:
    """The same of all texts in nested mappings and lists; a text under a key that is called as a secret is left out."""
    return _plain(value, key, _secrets(_environment()))


class RedactingFormatter(logging.Formatter):
    """Of a log line with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _plain(value: Any, key: str, secrets: list[tuple[str, str]]) -> Any:
    """`redact_plain`. The environment is looked through once for all texts: a record may hold hundreds."""
    if isinstance(value, Mapping):
        return {name: _plain(item, str(name), secrets) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, key, secrets) for item in value]
    if not isinstance(value, str):
        return value
    return f"<{key}>" if value and KEY.fullmatch(key) else _without(value, secrets)


def _without(text: str, secrets: list[tuple[str, str]]) -> str:
    for value, name in secrets:
        text = text.replace(value, f"<{name}>")
    return text


def _environment() -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in os.environ.items() if VARIABLE.fullmatch(name) and len(value) >= SHORTEST)


@functools.lru_cache(maxsize=8)
def _secrets(environment: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """Longest first: one may be a part of another."""
    values = {value: name for name, value in environment if not value.startswith("/") and not value.isdecimal()}
    return sorted(values.items(), key=lambda item: -len(item[0]))
