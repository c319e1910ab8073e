"""The weights of a new run with checkpoint.init: each rank reads its rectangles of them, whatever layout it has."""

from pathlib import Path
from typing import NamedTuple

from ..checkpoint.folder import checkpoints_of
from ..checkpoint.manifest import check_fits, read_manifest
from ..checkpoint.tensor_reader import TensorReader
from ..interop.load_weights import open_source, read_shards
from ..moe.init import reset_expert_biases
from ..parallel.apply import Parallel
from ..parallel.object_collectives import from_first, on_each_rank
from ..parallel.process_group import is_first
from ..parallel.shard import LocalShard
from .config.config import ConfigError
from .resume import first_intact
from .state import local_weights
from .weight_source import HF_CONFIG


class Initial(NamedTuple):
    """What the weights of a new run were read from."""

    path: Path
    note: str = ""
    """What else is to be said about the model, a sentence."""


def load_initial(parallel: Parallel, path: Path, folder: Path) -> Initial:
    """Fills the weights of a new run in `folder` with those of a checkpoint, a run folder or a Hugging Face folder. Collective.

    They are converted to the types of this run, which is exact unless these are narrower. Expert biases that it lacks are 0.
    Raises ValueError, one line, on all ranks.
    """
    reset_expert_biases(parallel.model)
    held = {name.removeprefix("model."): shard for name, shard in local_weights(parallel).items() if shard.tensor.numel()}
    failed = f"checkpoint.init={path} was not read"
    if from_first(lambda: (path / HF_CONFIG).is_file()):
        return on_each_rank(lambda: _read_hf_folder(path, held), failed)
    chosen, refused = first_intact(from_first(lambda: checkpoints_of(path)), folder)
    if chosen is None:
        reason = refused[0] if refused else "there is no checkpoint any more"
        raise ConfigError(f"checkpoint.init={path}: {reason}; nearest valid: an undamaged checkpoint")
    on_each_rank(lambda: _read_checkpoint(parallel, chosen, held), failed)
    return Initial(chosen)


def _read_hf_folder(path: Path, held: dict[str, LocalShard]) -> Initial:
    source = open_source(path)
    read_shards(source, held, complete=is_first())
    return Initial(path, source.family.training_note)


def _read_checkpoint(parallel: Parallel, path: Path, held: dict[str, LocalShard]) -> None:
    """Fills the shards, by names without `model.`, one after the other."""
    manifest = read_manifest(path)
    check_fits(parallel.model.config, manifest.tensors, path)
    with TensorReader(path, manifest.tensors) as reader:
        for name, (metadata, tensor) in held.items():
            if f"model.{name}" in manifest.tensors:  # a router's new expert bias is not
                tensor.copy_(reader.read(f"model.{name}", metadata))
