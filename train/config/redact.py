"""Replaces secrets, found by name and by value, in everything that is printed, saved or sent."""

import functools
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VARIABLE = re.compile(r".*(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)S?", re.IGNORECASE)
KEY = re.compile(r"(.*[_-])?(api_?key|key|token|secret|password|passwd|credentials?)", re.IGNORECASE)
SHORTEST = 8
"""Characters of a value that is searched for anywhere. A shorter one may be a part of a word, so only whole words are replaced."""
SHORTEST_WORD = 3
"""Characters below which a value is not searched for."""
URL_USER = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^\s/@:'\"<>]*:[^\s/@'\"<>]+@", re.IGNORECASE)
URL_QUERY = re.compile(
    r"(?P<key>[?&;](?:[\w.-]*[_.-])?(?:api_?key|key|token|secret|password|passwd|signature|sig|credential|access_?token)=)[^\s&#;'\"<>]+",
    re.IGNORECASE,
)
PLACEHOLDER = re.compile(r"<(?:user|secret|[\w-]*(?:key|token|secret|password|passwd|credentials?)s?)>", re.IGNORECASE)
"""What stands for a secret in a file of a run."""
NUMBERS = {int, float, bool}
Secrets = list[tuple[re.Pattern[str], str]]


def redact(text: str) -> str:
    """Returns `text` with secrets replaced by their names in angle brackets, and URLs without passwords and keys."""
    return _without(text, _secrets(_environment()))


def redact_plain(value: Any, key: str = "") -> Any:
    """Redacts all texts and keys in nested mappings and lists; a text whose key names a secret is replaced altogether."""
    return _plain(value, key, _secrets(_environment()))


class RedactingFormatter(logging.Formatter):
    """Redacts log records and their tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def redact_tracebacks() -> None:
    """Redacts the tracebacks of uncaught exceptions, in all threads, from now on."""
    sys.excepthook = lambda kind, error, trace: _show(error)
    threading.excepthook = lambda arguments: _show(arguments.exc_value)


def _show(error: BaseException | None) -> None:
    if error is not None and not isinstance(error, SystemExit):
        print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr, flush=True)


def _plain(value: Any, key: str, secrets: Secrets) -> Any:
    """Returns `redact_plain` with the secrets of the environment, which is searched once for all texts."""
    if isinstance(value, str):  # first, since records have ten thousand of them
        return f"<{key}>" if value and KEY.fullmatch(key) else _without(value, secrets)
    if isinstance(value, list | tuple):
        if set(map(type, value)) <= NUMBERS:  # tables of the experts have a million of them
            return value
        return [_plain(item, key, secrets) for item in value]
    if isinstance(value, Mapping):
        return {
            _without(name, secrets) if isinstance(name, str) else name: _plain(item, str(name), secrets)
            for name, item in value.items()
        }
    return value


def _without(text: str, secrets: Secrets) -> str:
    if "://" in text:
        text = URL_USER.sub(r"\g<scheme><user>@", text)
        text = URL_QUERY.sub(r"\g<key><secret>", text)
    for value, name in secrets:
        text = value.sub(f"<{name}>", text)
    return text


def _environment() -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in os.environ.items() if VARIABLE.fullmatch(name) and len(value) >= SHORTEST_WORD)


@functools.lru_cache(maxsize=8)
def _secrets(environment: tuple[tuple[str, str], ...]) -> Secrets:
    """Patterns and names of the secrets, longest first, since one may be a part of another."""
    # A variable such as GOOGLE_APPLICATION_CREDENTIALS names a file, which is no secret.
    values = {value: name for name, value in environment if not (value.startswith("/") and Path(value).exists())}
    return [(_pattern(value), name) for value, name in sorted(values.items(), key=lambda item: -len(item[0]))]


def _pattern(value: str) -> re.Pattern[str]:
    """Matches a value. Short values and numbers match as whole words only, and not as a part of a number: they are common."""
    whole = len(value) >= SHORTEST and not value.isdecimal()
    return re.compile(re.escape(value) if whole else rf"(?<![\w.]){re.escape(value)}(?![\w]|\.\d)")
