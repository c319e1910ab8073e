"""The folder `checkpoints` of a run: which are in it, what a crash has left, and which may go.

A checkpoint is complete exactly when it has its final name: it is written under another name and renamed. No torch here.
"""

import re
import secrets
import shutil
from pathlib import Path

from ..parallel.failpoints import failpoint
from .fsync import sync_folder
from .manifest import MANIFEST

FINAL = re.compile(r"step_(\d{8,})")
LEFTOVER = re.compile(r"(step_\d{8,})\.tmp-.+")
REPLACED = ".tmp-replaced-"
PRUNED = ".tmp-pruned-"


def checkpoints_in(folder: Path) -> list[Path]:
    """All with a final name, newest first; whether they can be read is not asked."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if FINAL.fullmatch(path.name) and path.is_dir()), key=step_of, reverse=True)


def checkpoints_of(path: Path) -> list[Path]:
    """Of a run folder or of its `checkpoints`, newest first; `path` itself if it is a checkpoint or has none."""
    if (path / MANIFEST).is_file():
        return [path]
    return checkpoints_in(path / "checkpoints") or checkpoints_in(path) or ([path] if FINAL.fullmatch(path.name) else [])


def newest_checkpoint(folder: Path) -> Path | None:
    """The one of the highest step in `folder` that has a manifest; None if there is none."""
    return next((path for path in checkpoints_in(Path(folder)) if (path / MANIFEST).is_file()), None)


def step_of(path: Path) -> int:
    """The step in the name."""
    return int(path.name.removeprefix("step_"))


def remove_checkpoint(path: Path) -> None:
    """Renamed first, so that no folder with a final name is ever half removed."""
    doomed = path.with_name(f"{path.name}{PRUNED}{secrets.token_hex(4)}")
    path.rename(doomed)
    sync_folder(doomed.parent)
    failpoint("checkpoint.prune", step_of(path))
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what interrupted saves left in `folder` and return those paths. For one rank, while nobody saves.

    A checkpoint that had been set aside for its replacement, which then never came, gets its name back.
    """
    removed = []
    for path in sorted(Path(folder).glob("step_*.tmp-*")):
        match = LEFTOVER.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        final = path.with_name(match[1])
        if REPLACED in path.name and (path / MANIFEST).is_file() and not final.exists():
            path.rename(final)
            sync_folder(final.parent)
        else:
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed
