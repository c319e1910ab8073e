"""Save and load training state: `step_00000100/` holds one safetensors file per rank and one manifest.

A checkpoint is complete exactly when it has its final name: it is written under another name and renamed.
"""

import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ...parallel.pieces import Held, whole
from .manifest import MANIFEST, Manifest, read_manifest
from .planner import HeldLoadPlanner, HeldSavePlanner
from .shards import DTYPES, sync_folder
from .storage import REPLACED, CheckpointReader, CheckpointWriter

COMPLETE = re.compile(r"step_(\d{8,})")
LEFTOVER = re.compile(r"(step_\d{8,})\.tmp-.+")
Result = TypeVar("Result")


def save_checkpoint(folder: Path, step: int, held: dict[str, Held], facts: dict[str, Any]) -> Path:
    """Write the tensors of all ranks to `folder/step_XXXXXXXX` and return that path once it is durable.

    Collective over the default process group, if there is one. Ranks that hold the same piece of a tensor must hold the same
    values: one of them writes it. `facts` is plain JSON; rank 0's are kept. A checkpoint of the same step is replaced.
    Raises, on every rank: ValueError for pieces that do not make up their tensor or facts that are no JSON, else RuntimeError.
    """
    writer = CheckpointWriter(Path(folder), step, facts)
    with _plain_errors(f"checkpoint {writer.final} was not saved"):
        try:
            save(dict(held), storage_writer=writer, planner=HeldSavePlanner(), no_dist=not dist.is_initialized())
        except BaseException:
            writer.discard()
            raise
    return writer.final


def load_checkpoint(path: Path, held: dict[str, Held], *, strict: bool = True, verify: bool = True) -> dict[str, Any]:
    """Fill the tensors of `held` from the checkpoint `path`, whatever layout it was written on, and return its facts.

    Collective over the default process group, if there is one. Each name must be in the checkpoint with the same global shape
    and dtype, and (if `strict`) each name of the checkpoint must be wanted by some rank. `verify` hashes the files; the ranks
    share that work. ValueError for whatever does not match, on every rank and before any tensor is changed.
    """
    path = Path(path)
    manifest = _on_first_rank(lambda: read_manifest(path))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    reader = CheckpointReader(path, manifest, rank=rank, world=world, verify=verify)
    _fill(reader, held, HeldLoadPlanner(path.name, strict), alone=not dist.is_initialized())
    return manifest.facts


def read_facts(path: Path) -> dict[str, Any]:
    """The facts that were saved with the checkpoint `path`; not collective."""
    return read_manifest(Path(path)).facts


def read_whole(path: Path, prefix: str = "model.", *, verify: bool = True) -> dict[str, torch.Tensor]:
    """The whole tensors, on the CPU, of all names that begin with `prefix`, by name without it; not collective."""
    path = Path(path)
    manifest = read_manifest(path)
    held = {
        name: Held(whole(record.shape), torch.empty(record.shape, dtype=DTYPES[record.dtype]))
        for name, record in manifest.tensors.items()
        if name.startswith(prefix)
    }
    if not held:
        raise ValueError(f"checkpoint {path}: no tensor's name begins with {prefix!r}; it has {_some_names(manifest)}")
    reader = CheckpointReader(path, manifest, rank=0, world=1, verify=verify)
    _fill(reader, held, HeldLoadPlanner(path.name, strict=False), alone=True)
    return {name.removeprefix(prefix): tensor for name, (_, tensor) in held.items()}


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in `folder`; None if there is none. Not collective."""
    return max(_complete(Path(folder)), key=_step, default=None)


def prune(folder: Path, keep: int) -> list[Path]:
    """Remove all complete checkpoints but the `keep` newest (at least one) and return their paths. For one rank."""
    old = sorted(_complete(Path(folder)), key=_step)[: -max(keep, 1)]
    for path in old:
        # Renamed first, so that no folder with a final name is ever half removed.
        doomed = path.with_name(f"{path.name}.tmp-pruned-{secrets.token_hex(4)}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return old


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what interrupted saves left in `folder` and return those paths. For one rank, while nobody saves.

    A checkpoint that had been set aside for its replacement, which then never came, gets its name back.
    """
    removed = []
    for path in sorted(Path(folder).glob("step_*.tmp-*")):
        match = LEFTOVER.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        final = path.with_name(match[1])
        if REPLACED in path.name and (path / MANIFEST).is_file() and not final.exists():
            path.rename(final)
            sync_folder(final.parent)
        else:
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if COMPLETE.fullmatch(path.name) and (path / MANIFEST).is_file()]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _some_names(manifest: Manifest) -> str:
    names = list(manifest.tensors)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "no tensors"


def _fill(reader: CheckpointReader, held: dict[str, Held], planner: HeldLoadPlanner, alone: bool) -> None:
    with _plain_errors(f"checkpoint {reader.path} was not loaded"):
        load(dict(held), storage_reader=reader, planner=planner, no_dist=alone)


@contextmanager
def _plain_errors(failed: str) -> Iterator[None]:
    """Turns torch's CheckpointException, which `except Exception` does not catch, into the error of the first rank that failed."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is (disabled, )?unavailable or uninitialized")
            yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        if isinstance(cause, ValueError):
            raise ValueError(str(cause)) from None
        raise RuntimeError(f"{failed}: rank {rank}: {type(cause).__name__}: {cause}") from error


def _on_first_rank(read: Callable[[], Result]) -> Result:
    """What rank 0 reads, or its error, on every rank: one reader of a small file, and one opinion about it."""
    if not dist.is_initialized():
        return read()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = read()
        except (OSError, ValueError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]
