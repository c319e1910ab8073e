"""Which code a run is of: the commit of the repository that this package lies in."""

import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def git_state(root: Path = ROOT) -> dict[str, Any]:
    """{"git": {"commit", "dirty"}}, or nothing where the code is no git checkout. `dirty`: tracked files were changed."""
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {} if commit is None or changes is None else {"git": {"commit": commit, "dirty": bool(changes)}}


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
