"""`tokenyard import`: a Hugging Face folder becomes a checkpoint of ours, as it is or with each feed-forward made into experts."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.bounded import LARGEST_TOKENIZER
from ..checkpoint.folder import newest_checkpoint
from ..checkpoint.store import save_checkpoint
from ..data.tokenizer import MODEL_FILE
from ..moe.config import ModelConfig
from ..parallel.shard import LocalShard, whole
from ..train.config.serialize import plain_config
from .load_weights import HFSource, open_source, read_weights
from .tokenizer_json import adopt
from .upcycle import Upcycle, upcycle, upcycled_config

CARRIED = "tokenizer_hf"
"""The folder of a checkpoint with the files that an export gives back unchanged."""
CARRIED_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@dataclass
class Imported:
    """What an import made."""

    checkpoint: Path
    architecture: str
    parameters: int
    notes: list[str] = field(default_factory=list)
    """What could not come along, a line each."""


def import_folder(path: Path, out: Path, wish: Upcycle | None = None) -> Imported:
    """Write `out/step_00000000` with the model of the folder `path`, its weights in the types in which they are stored.

    In memory is the model once. ValueError, one line, before anything is written, for what cannot be expressed or does not match.
    """
    if newest_checkpoint(out) or newest_checkpoint(out / "checkpoints"):
        raise ValueError(f"{out}: holds a checkpoint already; nearest valid: a new folder")
    source = open_source(path)
    _check_carried(path)
    if wish is not None:
        upcycled_config(source.model, wish)  # before the weights are read
    weights = read_weights(source)
    model = source.model if wish is None else upcycle(weights, source.model, wish)
    held = {f"model.{name}": LocalShard(whole(tensor.shape), tensor) for name, tensor in weights.items()}
    facts = _facts(source, model, wish)
    facts["config"]["tokenizer"] = {"path": str(out.resolve() / "step_00000000" / "tokenizer" / MODEL_FILE)}  # see `carry`
    notes: list[str] = []
    checkpoint = save_checkpoint(out, 0, held, facts, attach=lambda folder: notes.extend(carry(path, folder)))
    parameters = sum(tensor.numel() for tensor in weights.values())
    return Imported(checkpoint, source.family.architecture, parameters, notes)


def _check_carried(path: Path) -> None:
    """ValueError for a file beside the weights that is larger than any tokenizer."""
    for file in (path / name for name in CARRIED_FILES if (path / name).is_file()):
        if (size := file.stat().st_size) > LARGEST_TOKENIZER:
            raise ValueError(f"{file} has {size} bytes, more than {LARGEST_TOKENIZER}")


def carry(path: Path, checkpoint: Path) -> list[str]:
    """Copy the tokenizer's and generation's files into the checkpoint; what could not be used here too, a line each."""
    found = [name for name in CARRIED_FILES if (path / name).is_file()]
    for name in found:
        (checkpoint / CARRIED).mkdir(exist_ok=True)
        shutil.copyfile(path / name, checkpoint / CARRIED / name)
    if not {"tokenizer.json", "tokenizer.model"} & set(found):
        return ["no tokenizer: the folder has neither tokenizer.json nor tokenizer.model"]
    try:
        adopt(path, checkpoint / "tokenizer")
    except ValueError as error:
        return [f"tokenizer: only carried along, tokenyard cannot use it ({error})"]
    return []


def _facts(source: HFSource, model: ModelConfig, wish: Upcycle | None) -> dict[str, Any]:
    """Of a run that has not begun: what it leaves out of its configuration has the defaults."""
    origin: dict[str, Any] = {"architecture": source.family.architecture, "config": source.folder.config}
    if wish is not None:
        origin["upcycle"] = wish._asdict()
    return {
        "config": {"model": plain_config(model)},
        "step": 0,
        "tokens": 0,
        "ranks": 1,
        "layout": {},
        "tokenizer_hash": None,
        "data_fingerprint": None,
        "source": origin,
    }
