"""A run folder holds one timeline: what a run that goes on from an earlier point leaves behind is set aside, never mixed in.

`RUN/begun.json` says from where the run was told to begin and which launch did so: ranks that the same launch starts again go on
from what they wrote themselves. No torch here.
"""

import json
import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from ...checkpoint.folder import checkpoints_in, step_of
from ...checkpoint.fsync import sync_folder
from ..config.environment import launch_id, started_again
from ..config.private_files import write_private

BEGUN = "begun.json"


def goes_on(wish: str, folder: Path) -> bool:
    """Whether this start of the ranks repeats one of the same launch, which has begun as `wish` (checkpoint.resume) says."""
    return started_again() and _begun(folder) == _mark(wish)


def keep_begin(wish: str, folder: Path) -> None:
    """The checkpoints of `folder` are from now on of a run that has begun as `wish` says."""
    if _begun(folder) != _mark(wish):
        write_private(folder / BEGUN, json.dumps(_mark(wish)))


def set_aside(folder: Path, found: Path) -> Path | None:
    """Move the checkpoints that a run in `folder`, which goes on from `found`, has not come from into a folder with the date.

    Those are all later than `found`; and all there are if `found` is of another folder. None if there are none.
    """
    checkpoints = folder / "checkpoints"
    own = found.resolve().parent == checkpoints.resolve()
    strange = [path for path in checkpoints_in(checkpoints) if not own or step_of(path) > step_of(found)]
    if not strange:
        return None
    aside = _new_folder(checkpoints)
    for path in strange:
        path.rename(aside / path.name)
    sync_folder(checkpoints)
    return aside


def _new_folder(checkpoints: Path) -> Path:
    stem = datetime.now().strftime("set_aside_%Y-%m-%dT%H-%M-%S")
    for name in (stem if attempt == 1 else f"{stem}-{attempt}" for attempt in range(1, 10_000)):
        with suppress(FileExistsError):
            (checkpoints / name).mkdir(mode=0o700)
            return checkpoints / name
    raise FileExistsError(checkpoints / stem)


def _mark(wish: str) -> list[str]:
    path = wish if wish in ("auto", "never") else os.path.realpath(wish)
    return [path, launch_id()]


def _begun(folder: Path) -> list[str] | None:
    with suppress(OSError, ValueError):
        return json.loads((folder / BEGUN).read_text())
    return None
