"""Secrets, found by name and by value, are in nothing that is printed, saved or sent."""

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
"""Characters. A shorter value may be a part of a word by chance, and is looked for as a word of its own."""
SHORTEST_WORD = 3
URL_USER = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^\s/@:'\"<>]*:[^\s/@'\"<>]+@", re.IGNORECASE)
URL_QUERY = re.compile(
    r"(?P<key>[?&;](?:[\w.-]*[_.-])?(?:api_?key|key|token|secret|password|passwd|signature|sig|credential|access_?token)=)[^\s&#;'\"<>]+",
    re.IGNORECASE,
)
Secrets = list[tuple[re.Pattern[str], str]]


def redact(text: str) -> str:
    """`text` with the names of secrets, in angle brackets, where their values were; URLs without passwords and keys."""
    return _without(text, _secrets(_environment()))


def redact_plain(value: Any, key: str = "") -> Any:
    """The same of all texts and keys in nested mappings and lists; a text under a key that is called as a secret is left out."""
    return _plain(value, key, _secrets(_environment()))


class RedactingFormatter(logging.Formatter):
    """Of a log line with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def redact_tracebacks() -> None:
    """From now on what ends the process, or a thread of it, is printed without secrets."""
    sys.excepthook = lambda kind, error, trace: _show(error)
    threading.excepthook = lambda arguments: _show(arguments.exc_value)


def _show(error: BaseException | None) -> None:
    if error is not None and not isinstance(error, SystemExit):
        print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr, flush=True)


def _plain(value: Any, key: str, secrets: Secrets) -> Any:
    """`redact_plain`. The environment is looked through once for all texts: a record may hold hundreds."""
    if isinstance(value, Mapping):
        return {_name(name, secrets): _plain(item, str(name), secrets) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, key, secrets) for item in value]
    if not isinstance(value, str):
        return value
    return f"<{key}>" if value and KEY.fullmatch(key) else _without(value, secrets)


def _name(name: Any, secrets: Secrets) -> Any:
    return _without(name, secrets) if isinstance(name, str) else name


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
    """Longest first: one may be a part of another."""
    values = {value: name for name, value in environment if not _folder(value)}
    return [(_pattern(value), name) for value, name in sorted(values.items(), key=lambda item: -len(item[0]))]


def _folder(value: str) -> bool:
    """A variable as GOOGLE_APPLICATION_CREDENTIALS names a file, which is no secret."""
    return value.startswith("/") and Path(value).exists()


def _pattern(value: str) -> re.Pattern[str]:
    """Short values and numbers stand for something else more often than not: only as a word, and no part of a number."""
    whole = len(value) >= SHORTEST and not value.isdecimal()
    return re.compile(re.escape(value) if whole else rf"(?<![\w.]){re.escape(value)}(?![\w]|\.\d)")
