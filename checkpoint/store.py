"""Save and load training state: `step_00000100/` holds one safetensors file per rank and one manifest."""

import difflib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..parallel.object_collectives import any_rank, from_first, on_each_rank, rank_and_world
from ..parallel.shard import LocalShard, whole
from .folder import checkpoints_of
from .manifest import DamagedCheckpoint, Manifest, check_sizes, read_manifest
from .safetensors_file import DTYPES
from .save_plan import check_shard, dtype_name
from .saver import Saver
from .tensor_reader import Reads, fill_shards, reads_by_file
from .verify import check_files, check_headers, verify_checkpoint

log = logging.getLogger("tokenyard")


def save_checkpoint(
    folder: Path,
    step: int,
    shards: dict[str, LocalShard],
    facts: dict[str, Any],
    attach: Callable[[Path], None] | None = None,
    limit_seconds: float = 1800.0,
    read: Callable[[str], torch.Tensor] | None = None,
) -> Path:
    """Writes the tensors of all ranks to `folder/step_XXXXXXXX` and returns that path once it is durable.

    Collective over the default process group, if there is one. Ranks that hold the same shard of a tensor must hold the same
    values: one of them writes it. `facts` is plain JSON; rank 0's are kept. `attach(folder)` may write files into folders of that
    folder. `read(name)` returns the values of a tensor when it is written: the tensors of `shards` may then be on the meta device,
    and memory holds one at a time. A checkpoint of the same step is replaced. Raises, on every rank: ValueError for shards that do
    not make up their tensor or facts that are not JSON, else RuntimeError, also after `limit_seconds`.
    """
    saver = Saver(Path(folder), limit_seconds)
    result = saver.start(step, shards, facts, attach, asynchronous=False, read=read) or saver.wait()
    assert result is not None
    if result.error is not None:
        raise RuntimeError(f"checkpoint {result.path} was not saved: {result.error}")
    return result.path


def load_checkpoint(
    path: Path, shards: dict[str, LocalShard], *, strict: bool = True, verify: bool = True, optional: str | None = None
) -> dict[str, Any]:
    """Fills the tensors of `shards` from the checkpoint `path`, whatever layout it was written on, and returns its facts.

    Collective over the default process group, if there is one. Each name must be in the checkpoint with the same global shape and
    dtype, and (if `strict`) each name of the checkpoint must be wanted by some rank, or begin with `optional`. `verify` hashes the
    files; the ranks share that work. Raises ValueError for whatever does not match, on every rank and before any tensor is changed.
    """
    path = Path(path)
    failed = f"checkpoint {path} was not loaded"
    manifest = from_first(lambda: read_manifest(path))
    reads = on_each_rank(lambda: _checked_reads(path, manifest, shards, verify, *rank_and_world()), failed)
    if strict:
        # By name and not by what is read: a rank whose shard is empty wants the tensor but reads nothing.
        names = list(manifest.tensors)
        wanted = any_rank(*(name in shards for name in names))
        _refuse_unwanted(path, dict(zip(names, wanted, strict=True)), optional)
    on_each_rank(lambda: fill_shards(path, reads), failed)
    return manifest.facts


def newest_verified(paths: Iterable[Path], refused: Callable[[Path, DamagedCheckpoint], None]) -> Path | None:
    """Returns the first of `paths` that is undamaged, None if there is none; `refused` is called with each before it. Collective.

    All ranks must give the same paths.
    """
    for path in paths:
        try:
            verify_checkpoint(path)
        except DamagedCheckpoint as error:
            refused(path, error)
        else:
            return path
    return None


def checkpoint_at(path: Path) -> Path:
    """Returns `path` if it is a checkpoint, else the newest undamaged one of that run folder; logs damaged ones. Not collective.

    Raises ValueError if there is none.
    """
    found = checkpoints_of(path)
    if not found:
        raise ValueError(f"{path}: is neither a checkpoint nor a run folder with one")
    if found == [path]:
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
    """Returns the facts that were saved with the checkpoint `path`. Not collective."""
    return read_manifest(Path(path)).facts


def read_whole(path: Path, prefix: str = "model.") -> dict[str, torch.Tensor]:
    """Returns the whole tensors, on the CPU, of all names that begin with `prefix`, by name without it. Not collective."""
    path = Path(path)
    manifest = read_manifest(path)
    check_sizes(path, manifest)  # before memory is allocated
    shards = {
        name: LocalShard(whole(record.shape), torch.empty(record.shape, dtype=DTYPES[record.dtype]))
        for name, record in manifest.tensors.items()
        if name.startswith(prefix)
    }
    if not shards:
        names = list(manifest.tensors)
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "no tensors"
        raise ValueError(f"checkpoint {path}: no tensor's name begins with {prefix!r}; it has {some}")
    fill_shards(path, _checked_reads(path, manifest, shards, verify=True))
    return {name.removeprefix(prefix): shard.tensor for name, shard in shards.items()}


def _checked_reads(
    path: Path, manifest: Manifest, shards: dict[str, LocalShard], verify: bool, rank: int = 0, world: int = 1
) -> Reads:
    """Returns what this rank has to read. `verify` hashes this rank's part of all files.

    Raises ValueError if its shards do not match the checkpoint, or a file does not match the manifest.
    """
    missing = [name for name in shards if name not in manifest.tensors]
    if missing:
        raise ValueError(
            f"checkpoint {path.name}: tensor {missing[0]!r}{_and_more(missing)} is in this run but not in the checkpoint: "
            f"the names must be the same{_nearest(missing[0], manifest.tensors)}"
        )
    for name, shard in shards.items():
        check_shard(name, shard)
        metadata, tensor = shard
        stored, shape = manifest.tensors[name], tuple(metadata.shape)
        if (stored.shape, DTYPES[stored.dtype]) != (shape, tensor.dtype):
            raise ValueError(
                f"checkpoint {path.name}: tensor {name!r} is {dtype_name(DTYPES[stored.dtype])} {stored.shape} in the checkpoint "
                f"and {dtype_name(tensor.dtype)} {shape} in this run: shape and dtype must be the same"
            )
    reads = reads_by_file(manifest.tensors, shards)
    check_sizes(path, manifest, reads)
    check_headers(path, manifest, set(reads))
    if verify:
        check_files(path, manifest, rank, world)
    return reads


def _refuse_unwanted(path: Path, wanted: dict[str, bool], optional: str | None) -> None:
    """Raises ValueError for a tensor of the checkpoint that no rank wants. `wanted`: whether any does, by name."""
    extra = [name for name, any_does in wanted.items() if not any_does and not (optional and name.startswith(optional))]
    if extra:
        raise ValueError(
            f"checkpoint {path.name}: tensor {extra[0]!r}{_and_more(extra)} is in the checkpoint but not in this run: "
            f"the names must be the same{_nearest(extra[0], [name for name, any_does in wanted.items() if any_does])}"
        )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; the nearest name there is {near[0]!r}" if near else ""
