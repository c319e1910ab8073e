"""Removes old checkpoints of a folder. At least one that was found undamaged stays, whatever the settings say."""

from dataclasses import dataclass, field
from pathlib import Path

from .folder import checkpoints_in, remove_checkpoint, step_of
from .manifest import DamagedCheckpoint, read_manifest
from .verify import check_files

LOSS = "validation_loss"
"""The fact by which the best checkpoints are chosen."""
FileTimes = tuple[tuple[str, int, int], ...]
"""Name, size and time of change (ns) of each file."""


@dataclass
class Retention:
    """Keeps the `keep` newest, the `keep` that this process wrote last, each whose step is a multiple of `every` (0: none), and the
    `best` with the lowest validation loss."""

    keep: int = 2
    every: int = 0
    best: int = 0
    _written: list[Path] = field(default_factory=list)
    _undamaged: dict[Path, FileTimes] = field(default_factory=dict)

    def written(self, path: Path) -> None:
        """Adds a new checkpoint, which was hashed while it was written: it is not read again while its files keep size and time."""
        self._undamaged[path] = _file_times(path)
        self._written = [*(other for other in self._written if other != path), path]

    def prune(self, folder: Path) -> list[Path]:
        """Removes the checkpoints that need not be kept; returns their paths.

        Reads one to keep if none is known to be undamaged.
        """
        found = checkpoints_in(folder)
        newest = max(self.keep, 1)
        stay = (
            set(found[:newest])
            | set(self._written[-newest:])
            | {path for path in found if self.every and step_of(path) % self.every == 0}
        )
        stay |= set(self._best(found))
        doomed = [path for path in found if path not in stay]
        if not doomed:
            return []
        if not any(self._is_undamaged(path) for path in found if path in stay):
            # Spare the newest undamaged one: a run could resume from no other.
            spared = next((path for path in doomed if self._is_undamaged(path)), None)
            doomed = [path for path in doomed if path != spared] if spared else []
        for path in doomed:
            remove_checkpoint(path)
            self._undamaged.pop(path, None)
        return doomed[::-1]

    def _best(self, found: list[Path]) -> list[Path]:
        if self.best < 1:
            return []
        losses = {path: loss for path in found if (loss := _loss(path)) is not None}
        return sorted(losses, key=losses.__getitem__)[: self.best]

    def _is_undamaged(self, path: Path) -> bool:
        try:
            if self._undamaged.get(path) != (times := _file_times(path)):
                check_files(path, read_manifest(path))
                self._undamaged[path] = times
        except (DamagedCheckpoint, OSError):
            return False
        return True


def _loss(path: Path) -> float | None:
    try:
        return read_manifest(path).facts.get(LOSS)
    except DamagedCheckpoint:
        return None


def _file_times(path: Path) -> FileTimes:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return tuple((file.relative_to(path).as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
