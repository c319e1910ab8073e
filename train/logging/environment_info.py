"""The environment of a run: versions, host, devices, commit, command line. It is logged with the event of each start."""

import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...version import __version__
from ..config.redact import redact_plain

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("deepspeed", "wandb", "sentencepiece", "numpy")
"""Libraries, in addition to torch, whose version may matter to somebody who repeats the run."""


def git_state(root: Path = ROOT) -> dict[str, Any]:
    """Returns {"git": {"commit", "dirty"}} of this package, empty if it is no git checkout. `dirty`: tracked files were changed."""
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


def environment(device: torch.device, ranks: int) -> dict[str, Any]:
    """Returns texts and numbers by name; what does not exist is left out. `device`: that of this rank. Runs git."""
    git = git_state().get("git")
    found = {
        "tokenyard": __version__,
        **({} if git is None else {"commit": git["commit"] + (", with changes" if git["dirty"] else "")}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in LIBRARIES},
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpu": f"{_processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "ranks": ranks,
        **(_cuda(device) if device.type == "cuda" else {}),
        "command": shlex.join(map(_shown, sys.orig_argv)),
    }
    return {name: value for name, value in found.items() if value is not None}


def _shown(word: str) -> str:
    """Returns a word of the command line, without the value of a setting whose name suggests a secret."""
    key, equals, value = word.partition("=")
    return f"{key}={redact_plain(value, key.rpartition('.')[2])}" if equals else word


def _cuda(device: torch.device) -> dict[str, Any]:
    """Returns the facts of this host's GPUs; the hosts of a run are alike."""
    from torch.cuda import nccl

    return {
        "gpu": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}",
        "gpu_memory_bytes": torch.cuda.get_device_properties(device).total_memory,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl.version())),
    }


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Returns the name of the processor, which platform.processor() does not know on Linux."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
