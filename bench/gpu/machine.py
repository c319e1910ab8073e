"""The first part: reports GPUs, driver and versions, and what will be skipped because something is missing."""

import importlib.util
import os
import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from .recorder import Recorder

WANTED = {
    "yaml": "the tiny models' files cannot be read: no presets",
    "omegaconf": "no saves, no resume and no command",
    "hydra": "no command",
    "triton": "no torch.compile",
    "transformers": "nothing to compare layers with",
    "sentencepiece": "no tokenizer: no saves and no command",
    "pyarrow": "no corpus: no saves and no command",
}
"""Packages that may be missing, and what is then skipped."""


def run(recorder: Recorder) -> None:
    for name, value in versions().items():
        recorder.fact(name, value)
    for package, lost in WANTED.items():
        if not has(package):
            recorder.skip(package, f"not installed, nor in .gpu/ (make gpu-bundle, with a network): {lost}")
    if not recorder.cuda:
        recorder.skip("CUDA", "--device cpu: no NCCL, no streams, no waits reported by CUDA, no memory counted")
        return
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU; --device cpu --scale tiny tries the code without one")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        recorder.fact(
            f"GPU {index}",
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}",
        )
    if torch.cuda.device_count() < 2:
        recorder.skip("layouts", "one GPU: each layout of two needs two; the exchanges run with a world of one")
    if shutil.which(os.environ.get("CC", "gcc")) is None:
        recorder.skip("gcc", "there is no C compiler, which triton's launchers need: torch.compile may fail")
    sum_of_ones = torch.ones(1024, device=recorder.device).sum().item()
    recorder.check("the GPU adds up", sum_of_ones == 1024, f"1024 ones are {sum_of_ones}")


def versions() -> dict[str, Any]:
    """Versions of torch and of what it uses."""
    found: dict[str, Any] = {"torch": torch.__version__, "CUDA": torch.version.cuda, "cores": os.cpu_count()}
    found["driver"] = driver()
    found["NCCL"] = ".".join(map(str, nccl.version())) if dist.is_available() and torch.cuda.is_available() else None
    for package in ("triton", "transformers", "numpy"):
        found[package] = version(package)
    return {name: value for name, value in found.items() if value is not None}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """The version of NVIDIA's driver, by nvidia-smi; None without it."""
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        shown = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.stdout.split("\n")[0].strip()


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
