"""Files of a run folder: their owner alone reads them, and no link leads a write elsewhere. No torch here."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from .config import ConfigError

OWN = ("lock", "config.yaml", "run_id", "metrics.jsonl", "events.jsonl", "telemetry.jsonl")
"""Names in a run folder that tokenyard writes to."""


class CannotWrite(ValueError):
    """The folder of a run takes no files: its disk is full, or it is read-only."""


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """CannotWrite, one line, for an OSError inside of the block."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(
            f"run.dir={folder}: {' '.join(str(error).split())}; nearest valid: a folder that can be written"
        ) from error


def refuse_links(folder: Path) -> None:
    """ConfigError if one of the folder's own files is a link: what is written to it would land elsewhere."""
    for name in OWN:
        if (folder / name).is_symlink():
            rule = f"its file {name} is a link to {(folder / name).readlink()}"
            raise ConfigError.of("run.dir", str(folder), rule, "another run.dir, or remove that link")


def write_private(path: Path, text: str) -> None:
    """Replace `path` by a file with mode 0600: all of it or nothing, durably, and a link of that name is replaced itself."""
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with _opened(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def append_private(path: Path) -> IO[str]:
    """`path`, open for appending whole lines; made with mode 0600. OSError if it is a link."""
    return _opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)


def _opened(path: Path, flags: int) -> IO[str]:
    descriptor = os.open(path, flags, 0o600)
    return os.fdopen(descriptor, "a" if flags & os.O_APPEND else "w", encoding="utf-8", buffering=1)


def new_run_folder(parent: Path = Path("runs")) -> str:
    """runs/<date>-<time>, with a number behind it if that exists already; nothing is created."""
    stem = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    names = (stem if attempt == 1 else f"{stem}-{attempt}" for attempt in range(1, 10_000))
    return str(next(parent / name for name in names if not (parent / name).exists()))
