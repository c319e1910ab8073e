"""The tiny run of the checkpoint tests, and what its folder holds."""

from pathlib import Path
from typing import Any

import torch
from tiny_run import TINY_RUN
from tokenyard.checkpoint.folder import checkpoints_in, step_of
from tokenyard.checkpoint.store import read_whole
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config
from tokenyard.train.logging.journal import read_journal

CHECKPOINT_RUN = [
    *TINY_RUN,
    "steps=6",
    "schedule=constant",
    "evaluate.every=0",
    "evaluate.sequences=8",
    "checkpoint.every=2",
    "sample.prompt=''",
    "debug.dry_step=false",
]


def words(folder: Path, *overrides: str) -> list[str]:
    """The command line of the run in `folder`."""
    return [*CHECKPOINT_RUN, f"run.dir={folder}", f"data.cache={folder.parent / 'cache'}", *overrides]


def configured(folder: Path, *overrides: str) -> Config:
    return compose(words(folder, *overrides))


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_journal(folder / "events.jsonl") if event["event"] == kind]


def steps_in(folder: Path) -> list[int]:
    """The steps of its checkpoints, oldest first."""
    return [step_of(path) for path in checkpoints_in(folder / "checkpoints")][::-1]


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_journal(folder / "metrics.jsonl")}


def everything(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint but the generators' states."""
    return {name: tensor for name, tensor in read_whole(path, "").items() if not name.startswith("random.")}


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name].contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8)) for name in one
    )
