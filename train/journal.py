"""metrics.jsonl and events.jsonl: append-only files of one JSON object a line, which a crash or a resume leaves whole.

JSON has no NaN or infinity: they are written as the strings "NaN", "Infinity" and "-Infinity", and `read_journal` turns exactly
these back into floats. Floats are written with all their digits.
"""

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from .files import append_private, write_private
from .redact import redact_plain

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Journal:
    """Appends records to `path`; each line is with the operating system when `write` returns (a kill loses none, a power cut may).

    `keep_to_step`: first cut the file back to the records with `step` <= this, which a resumed run does with metrics.jsonl so that
    no step stands there twice; 0 empties it; None keeps all. A last line that a crash tore is dropped in any case.
    """

    def __init__(self, path: str | Path, keep_to_step: int | None = None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _mend(self.path, keep_to_step)
        self._file = append_private(self.path)
        self._lock = Lock()

    @classmethod
    def appending(cls, path: Path) -> "Journal":
        """Beside another one of the same file that is open: nothing of it is mended."""
        journal = cls.__new__(cls)
        journal.path = path
        journal._file = append_private(path)
        journal._lock = Lock()
        return journal

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. Tensors and arrays become lists."""
        line = json.dumps(redact_plain(_plain(record)), allow_nan=False, ensure_ascii=False) + "\n"
        with self._lock:
            self._file.write(line)

    def event(self, kind: str, /, **facts: Any) -> None:
        """Append a record of something that happened, with the time in UTC."""
        self.write({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind, **facts})

    def close(self) -> None:
        self._file.close()


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """The records of a journal, also of one that is being written: a torn last line is left out.

    Raises ValueError if a line before the last is not a JSON object.
    """
    return [_floats(record) for _, record in _lines(Path(path))]


def _mend(path: Path, keep_to_step: int | None) -> None:
    """Drop a torn last line and the records after `keep_to_step`, all at once: a crash here leaves the old file or the new one."""
    if not path.exists():
        return
    kept = [line for line, record in _lines(path) if keep_to_step is None or record.get("step", 0) <= keep_to_step]
    content = "".join(line + "\n" for line in kept)
    if content.encode() != path.read_bytes():
        write_private(path, content)


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line with its record."""
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()  # empty if the last line is whole; its newline may be all that it lacks
    found = []
    for number, line in enumerate(lines, start=1):
        if (record := _parse(line)) is None:
            if number == len(lines) and not torn:
                break
            raise ValueError(f"{path}, line {number}: not a JSON object; remove this line or use another run.dir")
        found.append((line.decode(), record))
    if (record := _parse(torn)) is not None:
        found.append((torn.decode(), record))
    return found


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object on a line, None if it is not one."""
    try:
        record = json.loads(line)
    except ValueError:  # also of bytes that are not UTF-8
        return None
    return record if isinstance(record, dict) else None


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
