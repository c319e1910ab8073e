"""The cache of trained tokenizers and tokenized corpora: folders named by a hash of their inputs, complete or absent."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .config import DataConfig


def cache_folder(config: DataConfig) -> Path:
    """Returns the cache folder, made if missing. Raises ValueError if it cannot be written."""
    folder = Path(config.cache or os.environ.get("TOKENYARD_CACHE") or "~/.cache/tokenyard").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ValueError(f"data.cache={folder} must be a folder that can be written; set data.cache or TOKENYARD_CACHE")
    return folder


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to fill and renames it to `folder` at the end, unless another process has written that meanwhile."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
