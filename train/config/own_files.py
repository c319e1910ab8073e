"""Writes the files of a run folder, never through a link; their modes follow the umask. Imports no torch."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from .config import ConfigError

RUN_FILES = ("lock", "config.yaml", "run_id", "metrics.jsonl", "events.jsonl", "telemetry.jsonl")
"""The files that tokenyard writes in a run folder."""


class CannotWrite(ValueError):
    """The run folder cannot be written: its disk is full, or it is read-only."""


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns an OSError inside the block into a CannotWrite of one line."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(
            f"run.dir={folder}: cannot be written ({error.strerror or error}); nearest valid: a folder that can be written"
        ) from error


def refuse_links(folder: Path) -> None:
    """Raises ConfigError if one of RUN_FILES is a link, since writes would go elsewhere."""
    for name in RUN_FILES:
        if (folder / name).is_symlink():
            rule = f"its file {name} is a link to {(folder / name).readlink()}"
            raise ConfigError.of("run.dir", str(folder), rule, "another run.dir, or remove that link")


def write_whole(path: Path, text: str, mode: int = 0o666) -> None:
    """Replaces `path` atomically and durably by a new file of `mode`, less the umask. A link of that name is replaced itself."""
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with _opened(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def open_appending(path: Path) -> IO[str]:
    """Opens `path` for appending lines. Raises OSError if it is a link."""
    return _opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)


def _opened(path: Path, flags: int, mode: int = 0o666) -> IO[str]:
    descriptor = os.open(path, flags, mode)
    return os.fdopen(descriptor, "a" if flags & os.O_APPEND else "w", encoding="utf-8", buffering=1)


def new_run_folder() -> str:
    """Returns a new name runs/<date>-<time>, with a number appended if that exists. Creates nothing."""
    parent, stem = Path("runs"), datetime.now().strftime("%Y-%m-%d-%H%M%S")
    names = (stem if attempt == 1 else f"{stem}-{attempt}" for attempt in range(1, 10_000))
    return str(next(parent / name for name in names if not (parent / name).exists()))
