"""Reads a run folder, and what is added to it later."""

import json
import math
from pathlib import Path
from typing import Any

from ..checkpoint.facts import check_model_numbers
from ..train.config.overrides import split_override
from ..train.saved_run import read_plain
from .columns import Columns
from .journal_reader import JournalReader, Record, RunError
from .telemetry_reader import Telemetry

NEEDED = ("config.yaml", "metrics.jsonl")
POINT = "point.json"
"""What differs between the points of a sweep, and the exit code, in the folder of a point that has ended."""


class Run:
    """The content of a run folder. Raises RunError if it is not a run folder, or for an invalid line in a journal."""

    def __init__(self, folder: Path):
        check_folder(folder)
        self.folder = folder
        self.name = folder.resolve().name
        self.config: dict[str, Any] = {}
        self._config_changed = 0
        self.metrics = Columns()
        self.events: list[dict[str, Any]] = []
        self.telemetry = Telemetry()
        self._readers = {name: JournalReader(folder / f"{name}.jsonl") for name in ("metrics", "events", "telemetry")}
        self._beginnings = dict.fromkeys(self._readers, 1)
        self.refresh()

    def refresh(self) -> bool:
        """Reads what was added. Returns whether there was anything."""
        return sum([self._read_config(), *(self._read(name) for name in self._readers)]) > 0

    def remarks(self) -> list[str]:
        """Messages about incomplete last lines."""
        return [reader.torn for reader in self._readers.values() if reader.torn]

    def last_step(self) -> int:
        """Returns the newest step of the metrics; 0 before the first."""
        column = self.metrics.by_name.get("step")
        return int(column.values[-1]) if column else 0

    def _read_config(self) -> bool:
        """Reads config.yaml if it has changed; a resumed run rewrites it. Returns whether it has."""
        path = self.folder / "config.yaml"
        changed = path.stat().st_mtime_ns
        if changed == self._config_changed:
            return False
        self.config, self._config_changed = read_config(path), changed
        return True

    def _read(self, name: str) -> bool:
        reader, something = self._readers[name], False
        for record in reader.read():
            if reader.beginnings > self._beginnings[name]:
                self._beginnings[name] = reader.beginnings
                self._forget(name)
            self._take(name, record)
            something = True
        return something

    def _forget(self, name: str) -> None:
        """Drops what was read of a journal that was rewritten."""
        if name == "metrics":
            self.metrics = Columns()
        elif name == "events":
            self.events = []
        else:
            self.telemetry = Telemetry()

    def _take(self, name: str, record: Record) -> None:
        if name == "metrics":
            self.metrics.add(record)
        elif name == "events":
            self.events.append(record.values)
        else:
            self.telemetry.add(record)


def check_folder(folder: Path) -> None:
    """Raises RunError, with the nearest run folder, if `folder` is not one."""
    if not folder.is_dir():
        existing = next((parent for parent in folder.absolute().parents if parent.is_dir()), Path("/"))
        raise RunError(f"{folder}: no such folder{_nearest(existing)}")
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise RunError(f"{folder}: not a run folder, has no {missing[0]}{_nearest(folder)}")


def run_folders(folder: Path) -> list[Path]:
    """Returns the folder, or, if it is none of a run and has some, as that of a sweep, those in it."""
    runs = [child for child in _children(folder) if _is_run(child)]
    return runs if runs and not _is_run(folder) else [folder]


def _is_run(folder: Path) -> bool:
    return all((folder / name).is_file() for name in NEEDED)


def read_point(folder: Path) -> dict[str, Any] | None:
    """Returns `differs`, the overrides in which a point of a sweep differs from the others, and `code`, its exit code.

    None for a run that is no point. Raises RunError if the file is not as a sweep writes it.
    """
    path = folder / POINT
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        differs = {key.lstrip("+~"): value for key, value in map(split_override, found["differs"])}
        return {"differs": differs, "code": found["code"]}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: not as `tokenyard train -m` writes it ({' '.join(str(error).split())})") from error


def without_run(folder: Path) -> int:
    """Returns how many points of a sweep in this folder ended before their run wrote anything."""
    return sum((child / POINT).is_file() and not _is_run(child) for child in _children(folder))


def _nearest(folder: Path) -> str:
    """Returns a hint with the newest run folder in `folder` or next to it."""
    for place in (folder, folder.absolute().parent):
        runs = [child for child in _children(place) if _is_run(child)]
        if runs:
            return f"; nearest valid: {max(runs, key=lambda run: run.stat().st_mtime)}"
    return "; nearest valid: the run.dir of a training run"


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def read_config(path: Path) -> dict[str, Any]:
    """Returns the configuration as plain values. Nothing is resolved, so no environment variable enters the page."""
    try:
        plain = read_plain(path)
        check_model_numbers(plain)
    except ValueError as error:
        raise RunError(f"{path}: {' '.join(str(error).split())}") from error
    return plain


def finite(value: float | None) -> float | None:
    """Returns `value` if it is finite, else None."""
    return value if value is not None and math.isfinite(value) else None
