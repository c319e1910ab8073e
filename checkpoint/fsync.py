"""Files that are on the disk when the call returns."""

import os
from pathlib import Path
from typing import Any


def sync(file: Any) -> None:
    """Flushes `file` and returns once its content is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Returns once the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Writes the new file `path`; other processes see all of it or nothing."""
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as file:
        file.write(content)
        sync(file)
    unfinished.rename(path)
