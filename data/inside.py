"""A folder's links lead nowhere outside of it. Standard library only."""

import os
from collections.abc import Iterable
from pathlib import Path


def refuse_outside(root: Path, files: Iterable[str], key: str) -> None:
    """ValueError of one line, which names the setting `key`, for the first of `files` that is not below the folder `root`.

    The cache of the Hugging Face hub is one folder: its snapshots are links to the blobs beside them.
    """
    home = os.path.realpath(root)
    inside = [home]
    if Path(home).parent.name == "snapshots":
        inside.append(str(Path(home).parent.parent / "blobs"))
    for file in files:
        real = os.path.realpath(file)
        if not any(real.startswith(f"{place}{os.sep}") for place in inside):
            raise ValueError(f"{key}={root} leads out of its folder: {file} is {real}; name that place itself, or take a copy")
