"""The name of a run folder that nobody chose."""

import datetime
from pathlib import Path


def new_run_folder(parent: Path = Path("runs")) -> str:
    """runs/<date>-<time>, with a number behind it if that exists already; nothing is created."""
    stem = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    names = (stem if attempt == 1 else f"{stem}-{attempt}" for attempt in range(1, 10_000))
    return str(next(parent / name for name in names if not (parent / name).exists()))
