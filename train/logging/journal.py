"""Journals such as metrics.jsonl and events.jsonl: append-only files of one JSON object a line, intact after a crash or a resume.

JSON has no NaN or infinity: they are written as the strings "NaN", "Infinity" and "-Infinity", and `read_journal` turns exactly
these back into floats. Floats are written with all their digits, those of tensors and arrays with DIGITS significant ones, which
takes a fifth of the time: statistics of the experts have a hundred thousand of them.
"""

import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

from ..config.own_files import open_appending, write_whole
from ..config.redact import NUMBERS, redact_plain

log = logging.getLogger("tokenyard")

WAITING = 2**24
"""Bytes of records that a journal keeps while the disk is full."""
DIGITS = 6
_MARK = secrets.token_hex(16)
_MARKED = re.compile(f'"{_MARK} ([0-9]+)"')
"""What stands for a table, by its number, until the rest of a record is JSON."""
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Journal:
    """Appends records to `path`. The operating system has each line when `write` returns: a kill loses none, a power cut may.

    `keep_to_step`: first cuts the file back to the records with `step` <= this (0: none, None: all). A resumed run does so with
    metrics.jsonl, so that no step is in it twice. A torn last line is always dropped. If other lines are damaged, the file is
    copied under a name with the date, and its readable lines stay.

    A full disk does not end a run: a warning is logged once, and up to WAITING bytes of lines wait for the next `write`.
    """

    def __init__(self, path: str | Path, keep_to_step: int | None = None):
        self._init_buffer(Path(path))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = _repair(self.path, keep_to_step)
        self._file = open_appending(self.path)
        if aside is not None:
            _log_set_aside(self.path, aside)

    @classmethod
    def appending(cls, path: Path) -> "Journal":
        """Opens a file that another Journal has open, without repairing it."""
        journal = cls.__new__(cls)
        journal._init_buffer(path)
        journal._file = open_appending(path)
        return journal

    def _init_buffer(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self._waiting = b""
        """Lines that are not written yet, the first perhaps in part."""
        self._lost = 0
        self._warned = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record. Tensors and arrays become lists."""
        tables: list[str] = []
        line = json.dumps(redact_plain(_plain(record, tables)), allow_nan=False, ensure_ascii=False) + "\n"
        line = _MARKED.sub(lambda found: tables[int(found[1])], line)
        with self._lock:
            if len(self._waiting) < WAITING:
                self._waiting += line.encode()
            else:
                self._lost += 1
            self._flush()

    def event(self, kind: str, /, **facts: Any) -> None:
        """Appends a record of something that happened, with the time in UTC."""
        self.write({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind, **facts})

    def close(self) -> None:
        """Closes the file. Logs a warning if records were not written."""
        with self._lock:
            self._flush()
            if self._waiting:
                log.warning(
                    "%s lacks its last %d records: the disk took no more", self.path, self._waiting.count(b"\n") + self._lost
                )
            self._waiting = b""
            self._file.close()

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file.fileno(), self._waiting) :]
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written (%s): its records wait until it can", self.path, error.strerror)
            self._warned = True


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """Returns the records of a journal, also of one that is being written: a torn last line is left out.

    Raises ValueError if a line before the last is not a JSON object.
    """
    found, damaged = _lines(Path(path))
    if damaged:
        raise ValueError(f"{path}, line {damaged[0]}: not a JSON object; remove this line or use another run.dir")
    return [_floats(record) for _, record in found]


def readable(path: str | Path) -> list[dict[str, Any]]:
    """Returns the records of a journal without the lines that are damaged."""
    return [_floats(record) for _, record in _lines(Path(path))[0]]


def _repair(path: Path, keep_to_step: int | None) -> Path | None:
    """Drops a torn last line and the records after `keep_to_step`. A crash here leaves the old file or the new one.

    Returns the copy of the file, if another line was damaged.
    """
    if not path.exists():
        return None
    found, damaged = _lines(path)
    kept = [line for line, record in found if keep_to_step is None or record.get("step", 0) <= keep_to_step]
    content = "".join(line + "\n" for line in kept)
    aside = _copy_aside(path) if damaged else None
    if content.encode() != path.read_bytes():
        write_whole(path, content)
    return aside


def _copy_aside(path: Path) -> Path:
    """Copies the file under a name with the date."""
    stem = path.with_name(f"{path.name}.damaged-{datetime.now():%Y-%m-%dT%H-%M-%S}")
    aside = next(each for number in count(1) if not (each := Path(f"{stem}-{number}" if number > 1 else stem)).exists())
    shutil.copy(path, aside)
    return aside


def _log_set_aside(path: Path, aside: Path) -> None:
    text = f"{path} had damaged lines: it is set aside as {aside.name}, and its readable lines are kept"
    log.warning("%s", text)
    with closing(Journal.appending(path.with_name("events.jsonl"))) as events:
        events.event("journal_set_aside", path=str(path), aside=str(aside))


def _lines(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], list[int]]:
    """Returns each line with its record, and the numbers of damaged lines, without a torn last one."""
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()  # empty if the last line is whole; its newline may be all that it lacks
    found, damaged = [], []
    for number, line in enumerate(lines, start=1):
        if (record := _parse(line)) is not None:
            found.append((line.decode(), record))
        elif number < len(lines) or torn:
            damaged.append(number)
    if (record := _parse(torn)) is not None:
        found.append((torn.decode(), record))
    return found, damaged


def _parse(line: bytes) -> dict[str, Any] | None:
    """Returns the object on a line, None if it is not one, or if its step is no number."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # also of bytes that are not UTF-8
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step", 0), int | float) else None


def _plain(value: Any, tables: list[str]) -> Any:
    """Returns `value` in a form that JSON can represent, with a mark for each table, whose JSON is appended to `tables`."""
    if isinstance(value, str):
        return value
    if hasattr(value, "tolist"):
        if (table := _table(value)) is not None:
            tables.append(table)
            return f"{_MARK} {len(tables) - 1}"
        value = value.tolist()
    if isinstance(value, list | tuple):
        if set(map(type, value)) <= NUMBERS and math.isfinite(sum(value)):
            return value
        return [_plain(item, tables) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item, tables) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _table(values: Any) -> str | None:
    """Returns the JSON of a tensor or an array; None if it has no dimension, or something that is no finite number."""
    flat = values.reshape(-1).tolist()
    kinds = set(map(type, flat))
    if not values.shape or kinds not in ({int}, {float}) or not math.isfinite(sum(flat)):
        return None
    template = f"%.{DIGITS}g" if kinds == {float} else "%d"
    for size in reversed(values.shape):
        template = f"[{', '.join([template] * size)}]"
    return template % tuple(flat)


def _floats(value: Any) -> Any:
    """Reverses `_plain` where that is possible."""
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
