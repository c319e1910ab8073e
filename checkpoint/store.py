"""Save and load training state: `step_00000100/` holds one safetensors file per rank and one manifest."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from ..parallel.object_collectives import from_first, rank_and_world
from ..parallel.shard import LocalShard, whole
from .dcp import CheckpointReader, HeldLoadPlanner
from .folder import checkpoints_of
from .manifest import DamagedCheckpoint, Manifest, check_sizes, read_manifest
from .safetensors_file import DTYPES
from .saver import Saver
from .verify import check_files, verified

log = logging.getLogger("tokenyard")


def save_checkpoint(
    folder: Path,
    step: int,
    held: dict[str, LocalShard],
    facts: dict[str, Any],
    attach: Callable[[Path], None] | None = None,
    limit_seconds: float = 1800.0,
) -> Path:
    """Write the tensors of all ranks to `folder/step_XXXXXXXX` and return that path once it is durable.

    Collective over the default process group, if there is one. Ranks that hold the same piece of a tensor must hold the same
    values: one of them writes it. `facts` is plain JSON; rank 0's are kept. `attach(folder)` may write files into folders of that
    folder. A checkpoint of the same step is replaced. Raises, on every rank: ValueError for pieces that do not make up their tensor
    or facts that are no JSON, else RuntimeError, also after `limit_seconds`.
    """
    saver = Saver(Path(folder), limit_seconds)
    outcome = saver.start(step, held, facts, attach, asynchronous=False) or saver.wait()
    assert outcome is not None
    if outcome.error is not None:
        raise RuntimeError(f"checkpoint {outcome.path} was not saved: {outcome.error}")
    return outcome.path


def load_checkpoint(
    path: Path, held: dict[str, LocalShard], *, strict: bool = True, verify: bool = True, optional: str | None = None
) -> dict[str, Any]:
    """Fill the tensors of `held` from the checkpoint `path`, whatever layout it was written on, and return its facts.

    Collective over the default process group, if there is one. Each name must be in the checkpoint with the same global shape
    and dtype, and (if `strict`) each name of the checkpoint must be wanted by some rank, or begin with `optional`. `verify` hashes
    the files; the ranks share that work. ValueError for whatever does not match, on every rank and before any tensor is changed.
    """
    path = Path(path)
    manifest = from_first(lambda: read_manifest(path))
    rank, world = rank_and_world()
    reader = CheckpointReader(path, manifest, rank=rank, world=world, verify=verify)
    _fill(reader, held, HeldLoadPlanner(path.name, strict, optional), alone=not dist.is_initialized())
    return manifest.facts


def newest_verified(paths: Iterable[Path], refused: Callable[[Path, DamagedCheckpoint], None]) -> Path | None:
    """The first of `paths` that is what it was when it was written; `refused` hears of those before it. Collective.

    All ranks must give the same paths. None if there is none.
    """
    for path in paths:
        try:
            verified(path)
        except DamagedCheckpoint as error:
            refused(path, error)
        else:
            return path
    return None


def checkpoint_at(path: Path) -> Path:
    """`path` if that is a checkpoint; of a run folder the newest that is whole, with a line about each that is not. Not collective.

    ValueError if there is none.
    """
    found = checkpoints_of(path)
    if found in ([], [path]):
        if not found:
            raise ValueError(f"{path}: is neither a checkpoint nor a run folder with one")
        return path
    refused: list[DamagedCheckpoint] = []
    for each in found:
        try:
            check_files(each, read_manifest(each))
        except DamagedCheckpoint as error:
            refused.append(error)
            log.warning("%s is refused, the one before it is tried: %s", each, error)
        else:
            return each
    raise ValueError(f"{path}: none of its {len(found)} checkpoints is whole; {refused[0]}")


def read_facts(path: Path) -> dict[str, Any]:
    """The facts that were saved with the checkpoint `path`; not collective."""
    return read_manifest(Path(path)).facts


def read_whole(path: Path, prefix: str = "model.", *, verify: bool = True) -> dict[str, torch.Tensor]:
    """The whole tensors, on the CPU, of all names that begin with `prefix`, by name without it; not collective."""
    path = Path(path)
    manifest = read_manifest(path)
    check_sizes(path, manifest)  # before memory is asked for
    held = {
        name: LocalShard(whole(record.shape), torch.empty(record.shape, dtype=DTYPES[record.dtype]))
        for name, record in manifest.tensors.items()
        if name.startswith(prefix)
    }
    if not held:
        raise ValueError(f"checkpoint {path}: no tensor's name begins with {prefix!r}; it has {_some_names(manifest)}")
    reader = CheckpointReader(path, manifest, rank=0, world=1, verify=verify)
    _fill(reader, held, HeldLoadPlanner(path.name, strict=False), alone=True)
    return {name.removeprefix(prefix): tensor for name, (_, tensor) in held.items()}


def _some_names(manifest: Manifest) -> str:
    names = list(manifest.tensors)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "no tensors"


def _fill(reader: CheckpointReader, held: dict[str, LocalShard], planner: HeldLoadPlanner, alone: bool) -> None:
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
