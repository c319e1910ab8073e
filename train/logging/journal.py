"""metrics.jsonl and events.jsonl: append-only files of one JSON object a line, which a crash or a resume leaves whole.

JSON has no NaN or infinity: they are written as the strings "NaN", "Infinity" and "-Infinity", and `read_journal` turns exactly
these back into floats. Floats are written with all their digits.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

from ..config.private_files import append_private, write_private
from ..config.redact import redact_plain

log = logging.getLogger("tokenyard")

WAITING = 2**24
"""Bytes of records that a journal keeps for a disk that takes none."""
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Journal:
    """Appends records to `path`; each line is with the operating system when `write` returns (a kill loses none, a power cut may).

    `keep_to_step`: first cut the file back to the records with `step` <= this, which a resumed run does with metrics.jsonl so that
    no step stands there twice; 0 empties it; None keeps all. A last line that a crash tore is dropped in any case, and a file with
    other lines that are damaged is set aside under a name with the date; its readable lines stay.

    A disk that takes no line does not end a run: that is said once, and the lines wait, up to WAITING bytes, for the next `write`.
    """

    def __init__(self, path: str | Path, keep_to_step: int | None = None):
        self._begin(Path(path))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = _mend(self.path, keep_to_step)
        self._file = append_private(self.path)
        if aside is not None:
            _say_set_aside(self.path, aside)

    @classmethod
    def appending(cls, path: Path) -> "Journal":
        """Beside another one of the same file that is open: nothing of it is mended."""
        journal = cls.__new__(cls)
        journal._begin(path)
        journal._file = append_private(path)
        return journal

    def _begin(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self._waiting = b""
        """Lines, the first perhaps in part, that the disk has not taken."""
        self._lost = 0
        self._told = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. Tensors and arrays become lists."""
        line = json.dumps(redact_plain(_plain(record)), allow_nan=False, ensure_ascii=False) + "\n"
        with self._lock:
            if len(self._waiting) < WAITING:
                self._waiting += line.encode()
            else:
                self._lost += 1
            self._flush()

    def event(self, kind: str, /, **facts: Any) -> None:
        """Append a record of something that happened, with the time in UTC."""
        self.write({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind, **facts})

    def close(self) -> None:
        """Says how many records were not written, if any."""
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
            if not self._told:
                log.warning("%s cannot be written (%s): its records wait until it can", self.path, error.strerror)
            self._told = True


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """The records of a journal, also of one that is being written: a torn last line is left out.

    Raises ValueError if a line before the last is not a JSON object.
    """
    found, damaged = _lines(Path(path))
    if damaged:
        raise ValueError(f"{path}, line {damaged[0]}: not a JSON object; remove this line or use another run.dir")
    return [_floats(record) for _, record in found]


def readable(path: str | Path) -> list[dict[str, Any]]:
    """The records of a journal that may be damaged, without the lines that are."""
    return [_floats(record) for _, record in _lines(Path(path))[0]]


def _mend(path: Path, keep_to_step: int | None) -> Path | None:
    """Drop a torn last line and the records after `keep_to_step`, all at once: a crash here leaves the old file or the new one.

    Where the file was set aside, if another line is damaged.
    """
    if not path.exists():
        return None
    found, damaged = _lines(path)
    kept = [line for line, record in found if keep_to_step is None or record.get("step", 0) <= keep_to_step]
    content = "".join(line + "\n" for line in kept)
    aside = _copy_aside(path) if damaged else None
    if content.encode() != path.read_bytes():
        write_private(path, content)
    return aside


def _copy_aside(path: Path) -> Path:
    """The file as it was, under a name with the date."""
    stem = path.with_name(f"{path.name}.damaged-{datetime.now():%Y-%m-%dT%H-%M-%S}")
    aside = next(each for number in count(1) if not (each := Path(f"{stem}-{number}" if number > 1 else stem)).exists())
    shutil.copy(path, aside)
    return aside


def _say_set_aside(path: Path, aside: Path) -> None:
    text = f"{path} had damaged lines: it is set aside as {aside.name}, and its readable lines are kept"
    log.warning("%s", text)
    with closing(Journal.appending(path.with_name("events.jsonl"))) as events:
        events.event("journal_set_aside", path=str(path), aside=str(aside))


def _lines(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], list[int]]:
    """Each line with its record, and the numbers of those before a torn last one that are damaged."""
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
    """The object on a line, None if it is not one, or its step is no number."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # also of bytes that are not UTF-8
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step", 0), int | float) else None


def _plain(value: Any) -> Any:
    """`value` as JSON can write it."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _floats(value: Any) -> Any:
    """The reverse of `_plain`, as far as it can be undone."""
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
