"""The weights of a new run with checkpoint.init: each rank reads its rectangles of them, whatever layout it has."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..checkpoint.folder import checkpoints_of
from ..checkpoint.manifest import check_fits, read_manifest
from ..checkpoint.tensor_reader import TensorReader
from ..interop.load_weights import open_source, read_shards
from ..interop.upcycle import Upcycle, read_upcycled
from ..moe.init import reset_expert_biases
from ..parallel.apply import Parallel
from ..parallel.object_collectives import from_first, on_each_rank
from ..parallel.process_group import is_first
from ..parallel.shard import LocalShard
from .config.config import Config, ConfigError
from .resume import first_intact
from .state import local_weights
from .weight_source import hf_folder, upcycle_options


class Initial(NamedTuple):
    """What the weights of a new run were read from."""

    path: Path
    note: str = ""
    """What else is to be said about the model, a sentence."""


def load_initial(parallel: Parallel, config: Config, folder: Path) -> Initial:
    """Fills the weights of a new run in `folder` with those of checkpoint.init. Collective.

    They are converted to the types of this run, which is exact unless these are narrower. Expert biases that it lacks are 0.
    Raises ValueError, one line, on all ranks.
    """
    assert config.checkpoint.init is not None
    path, options = Path(config.checkpoint.init).expanduser(), upcycle_options(config)
    reset_expert_biases(parallel.model)
    held = {name.removeprefix("model."): shard for name, shard in local_weights(parallel).items() if shard.tensor.numel()}
    failed = f"checkpoint.init={path} was not read"
    upcycled = "" if options is None else f"each feed-forward upcycled to {options.experts} experts"
    hf = from_first(lambda: hf_folder(path))
    if hf is not None:
        note = on_each_rank(lambda: _read_hf_folder(parallel, hf, held, options), failed)
        return Initial(hf, upcycled or note)
    chosen, refused = first_intact(from_first(lambda: checkpoints_of(path)), folder)
    if chosen is None:
        reason = refused[0] if refused else "there is no checkpoint any more"
        raise ConfigError(f"checkpoint.init={path}: {reason}; nearest valid: an undamaged checkpoint")
    on_each_rank(lambda: _read_checkpoint(parallel, chosen, held, options), failed)
    return Initial(chosen, upcycled)


def _read_hf_folder(parallel: Parallel, path: Path, held: dict[str, LocalShard], options: Upcycle | None) -> str:
    source = open_source(path)
    if options is None:
        read_shards(source, held, complete=is_first())
    else:
        read_upcycled(partial(read_shards, source, complete=False), held, parallel.model.config, options)
        read_shards(source, {}, complete=is_first())
    return source.family.training_note


def _read_checkpoint(parallel: Parallel, path: Path, held: dict[str, LocalShard], options: Upcycle | None) -> None:
    """Fills the shards, by names without `model.`, one after the other."""
    manifest = read_manifest(path)
    with TensorReader(path, manifest.tensors) as reader:

        def read(shards: dict[str, LocalShard]) -> None:
            for name, (metadata, tensor) in shards.items():
                if f"model.{name}" in manifest.tensors:  # a router's new expert bias is not
                    tensor.copy_(reader.read(f"model.{name}", metadata))

        if options is None:
            check_fits(parallel.model.config, manifest.tensors, path)
            read(held)
        else:
            read_upcycled(read, held, parallel.model.config, options)
