"""`python -m tokenyard.launch.host_check RANKS DEVICE FOLDER...`: whether this host can run its ranks, before a job starts.

Each device computes a product twice and must get the same finite numbers, and each folder must take a file. Ends with 0, or with 1
and a line that says what is wrong. launch=slurm runs it on every host if launch.slurm.spares is set.
"""

import secrets
import sys
from pathlib import Path

from ..train.config.complain import say

SIZE = 1024
"""Rows and columns of the product."""


def problem(ranks: int, device: str, folders: list[str]) -> str | None:
    """Returns what this host lacks, None if nothing. device: as the setting; auto and cuda: a GPU for each rank."""
    import torch

    try:
        for folder in map(Path, folders):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f"probe-{secrets.token_hex(8)}"
            probe.write_bytes(b"x")
            probe.unlink()
        if device != "cpu" and torch.cuda.device_count() < ranks:
            return f"it has {torch.cuda.device_count()} GPUs for launch.ranks={ranks}"
        for name in ["cpu"] if device == "cpu" else [f"cuda:{index}" for index in range(ranks)]:
            x = torch.linspace(-1, 1, SIZE * SIZE, device=name).view(SIZE, SIZE)
            one, other = x @ x, x @ x
            if not torch.equal(one, other) or not bool(one.isfinite().all()):
                return f"{name} computes the same product differently, or not at all"
    except (OSError, RuntimeError) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    found = problem(int(argv[0]), argv[1], argv[2:])
    if found is not None:
        say(f"this host is left out: {found}")
    return 0 if found is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
