"""The folder `checkpoints` of a run: lists its checkpoints and removes them, and what interrupted saves left.

A checkpoint is complete exactly when it has its final name: it is written under another name and renamed. No torch here.
"""

import re
import secrets
import shutil
from pathlib import Path

from ..parallel.failpoints import failpoint
from .fsync import sync_folder
from .manifest import MANIFEST, STEP_FOLDER

LEFTOVER = re.compile(r"(step_\d{8,})\.tmp-.+")
REPLACED = ".tmp-replaced-"
PRUNED = ".tmp-pruned-"


def checkpoints_in(folder: Path) -> list[Path]:
    """Returns all checkpoints with a final name, newest first; they are not opened."""
    if not folder.is_dir():
        return []
    return sorted(
        (path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name) and path.is_dir()), key=step_of, reverse=True
    )


def checkpoints_of(path: Path) -> list[Path]:
    """Returns the checkpoints in a run folder or its `checkpoints`, newest first; `path` alone if it is one or named like one."""
    if (path / MANIFEST).is_file():
        return [path]
    return checkpoints_in(path / "checkpoints") or checkpoints_in(path) or ([path] if STEP_FOLDER.fullmatch(path.name) else [])


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint in `folder` with the highest step that has a manifest; None if there is none."""
    return next((path for path in checkpoints_in(Path(folder)) if (path / MANIFEST).is_file()), None)


def step_of(path: Path) -> int:
    """Returns the step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step_"))


def remove_checkpoint(path: Path) -> None:
    """Renames the folder, so that none with a final name is ever half removed, and removes it."""
    renamed = path.with_name(f"{path.name}{PRUNED}{secrets.token_hex(4)}")
    path.rename(renamed)
    sync_folder(renamed.parent)
    failpoint("checkpoint.prune", step_of(path))
    shutil.rmtree(renamed, ignore_errors=True)


def remove_leftovers(folder: Path) -> list[Path]:
    """Removes what interrupted saves left in `folder` and returns those paths. On one rank, while no save is under way.

    A checkpoint that was set aside for a replacement that never came gets its name back.
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
