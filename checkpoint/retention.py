"""Which checkpoints of a folder may go. At least one that was found whole stays, whatever the numbers say."""

from dataclasses import dataclass, field
from pathlib import Path

from .folder import checkpoints_in, remove_checkpoint, step_of
from .manifest import DamagedCheckpoint, read_manifest
from .verify import check_files

LOSS = "validation_loss"
"""The fact by which the best are found."""
Stamp = tuple[tuple[str, int, int], ...]


@dataclass
class Retention:
    """`keep` newest of all and of those written here, every one whose step is a multiple of `every` (0: none), and the `best` with
    the lowest validation loss."""

    keep: int = 2
    every: int = 0
    best: int = 0
    _written: list[Path] = field(default_factory=list)
    _whole: dict[Path, Stamp] = field(default_factory=dict)

    def written(self, path: Path) -> None:
        """`path` was hashed while it was written: as long as its files have the same size and time, it is not read again."""
        self._whole[path] = _stamp(path)
        self._written = [*(other for other in self._written if other != path), path]

    def prune(self, folder: Path) -> list[Path]:
        """Remove what may go and return those paths; one that stays is read if nothing else tells that it is whole."""
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
        if not any(self._is_whole(path) for path in found if path in stay):
            # The newest of the old that is whole is all that a run could go on from.
            spared = next((path for path in doomed if self._is_whole(path)), None)
            doomed = [path for path in doomed if path != spared] if spared else []
        for path in doomed:
            remove_checkpoint(path)
            self._whole.pop(path, None)
        return doomed[::-1]

    def _best(self, found: list[Path]) -> list[Path]:
        if self.best < 1:
            return []
        losses = {path: loss for path in found if (loss := _loss(path)) is not None}
        return sorted(losses, key=losses.__getitem__)[: self.best]

    def _is_whole(self, path: Path) -> bool:
        try:
            if self._whole.get(path) != (stamp := _stamp(path)):
                check_files(path, read_manifest(path))
                self._whole[path] = stamp
        except (DamagedCheckpoint, OSError):
            return False
        return True


def _loss(path: Path) -> float | None:
    try:
        return read_manifest(path).facts.get(LOSS)
    except DamagedCheckpoint:
        return None


def _stamp(path: Path) -> Stamp:
    """Name, size and time of change of each file."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return tuple((file.relative_to(path).as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
