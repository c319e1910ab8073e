"""Reads a journal (train/logging/journal.py) while it is still being written: each record once, when its line is complete."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class RunError(ValueError):
    """The run cannot be shown. The message is one line with the folder, or with the file and line."""


class Record(NamedTuple):
    """An object of a journal; `where` is its file and line, for error messages."""

    where: str
    values: dict[str, Any]


class JournalReader:
    """Returns the new records of the file `path` at each call of `read`.

    A resumed run truncates or replaces its journals. `read` then starts from the beginning, and `beginnings` increases by one.
    """

    def __init__(self, path: Path):
        self.path = path
        self.beginnings = 0
        self.torn: str | None = None
        """A message if the last line is incomplete."""
        self._inode = -1
        self._offset = 0
        self._line = 0

    def read(self) -> Iterator[Record]:
        """Yields the records since the last call. Raises RunError for a line that is not a JSON object, unless it is the last."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return
        if status.st_ino != self._inode or status.st_size < self._offset:
            self.beginnings += 1
            self._inode, self._offset, self._line = status.st_ino, 0, 0
        if status.st_size > self._offset or self.torn:
            yield from self._lines()

    def _lines(self) -> Iterator[Record]:
        wrong = None
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for number, line in enumerate(file, start=self._line + 1):
                if wrong:
                    raise RunError(f"{wrong}: not a JSON object; remove this line")
                where = f"{self.path}, line {number}"
                values = _parse(line)
                if values is None and line.strip():
                    # A crash tears only the last line, and a line that is being written is the last one.
                    wrong = where
                    continue
                self._offset += len(line)
                self._line += line.endswith(b"\n")
                if values is not None:
                    yield Record(where, values)
        self.torn = f"{wrong}: not whole, left out" if wrong else None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _refuse(name: str) -> None:
    """JSON has no NaN; a journal writes the word as a string."""
    raise ValueError(name)
