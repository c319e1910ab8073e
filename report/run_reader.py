"""A run folder, read so far; `refresh` reads what was written since."""

import math
from pathlib import Path
from typing import Any

from ..checkpoint.bounded import read_regular
from ..checkpoint.facts import DEEPEST, check_model_numbers, check_plain
from .columns import Columns
from .journal_reader import Record, RunError, Tail
from .telemetry_reader import Telemetry

LARGEST_CONFIG = 1 << 16
"""Bytes of a config.yaml; a run writes some thousand."""
NEEDED = ("config.yaml", "metrics.jsonl")


class Run:
    """What the journals of the run in `folder` say. RunError if it is no run folder, or for a wrong line in a journal."""

    def __init__(self, folder: Path):
        check_folder(folder)
        self.folder = folder
        self.name = folder.resolve().name
        self.config: dict[str, Any] = {}
        self._config_changed = 0
        self.metrics = Columns()
        self.events: list[dict[str, Any]] = []
        self.telemetry = Telemetry()
        self._tails = {name: Tail(folder / f"{name}.jsonl") for name in ("metrics", "events", "telemetry")}
        self._beginnings = dict.fromkeys(self._tails, 1)
        self.refresh()

    def refresh(self) -> bool:
        """Reads what is new; whether there was anything."""
        return sum([self._read_config(), *(self._read(name) for name in self._tails)]) > 0

    def remarks(self) -> list[str]:
        """In words, what could not be read."""
        return [tail.torn for tail in self._tails.values() if tail.torn]

    def last_step(self) -> int:
        """The newest step of the metrics; 0 before the first."""
        column = self.metrics.by_name.get("step")
        return int(column.values[-1]) if column else 0

    def _read_config(self) -> bool:
        """A resumed run writes it again."""
        path = self.folder / "config.yaml"
        changed = path.stat().st_mtime_ns
        if changed == self._config_changed:
            return False
        self.config, self._config_changed = read_config(path), changed
        return True

    def _read(self, name: str) -> bool:
        tail, something = self._tails[name], False
        for record in tail.read():
            if tail.beginnings > self._beginnings[name]:
                self._beginnings[name] = tail.beginnings
                self._forget(name)
            self._take(name, record)
            something = True
        return something

    def _forget(self, name: str) -> None:
        """The journal was written anew."""
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
    """RunError with the nearest folder that is one."""
    if not folder.is_dir():
        existing = next((parent for parent in folder.absolute().parents if parent.is_dir()), Path("/"))
        raise RunError(f"{folder}: no such folder{_nearest(existing)}")
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise RunError(f"{folder}: not a run folder, has no {missing[0]}{_nearest(folder)}")


def _nearest(folder: Path) -> str:
    """The newest run folder in `folder` or beside it, in words."""
    for place in (folder, folder.absolute().parent):
        runs = [child for child in _children(place) if all((child / name).is_file() for name in NEEDED)]
        if runs:
            return f"; nearest valid: {max(runs, key=lambda run: run.stat().st_mtime)}"
    return "; nearest valid: the run.dir of a training run"


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def read_config(path: Path) -> dict[str, Any]:
    """As plain values: nothing in it is resolved, and so nothing of the environment comes into the page."""
    import yaml

    try:
        text = read_regular(path, LARGEST_CONFIG).decode()
        _check_events(yaml.parse(text, yaml.SafeLoader))
        plain = yaml.safe_load(text)
        check_plain(plain, "the configuration")
        check_model_numbers(plain if isinstance(plain, dict) else {})
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise RunError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict):
        raise RunError(f"{path}: must hold the configuration of a run")
    return plain


def _check_events(events: Any) -> None:
    """ValueError for an alias, by which some lines stand for millions, and for deep nesting, in which the parser takes long."""
    import yaml

    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
            raise ValueError(f"may have no aliases, and no more than {DEEPEST} levels")


def finite(value: float | None) -> float | None:
    """`value` unless it is not finite."""
    return value if value is not None and math.isfinite(value) else None
