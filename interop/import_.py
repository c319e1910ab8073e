"""`tokenyard import`: makes a checkpoint of a Hugging Face folder, as it is or with experts made of each feed-forward."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.bounded import LARGEST_TOKENIZER, short_message
from ..checkpoint.folder import newest_checkpoint
from ..checkpoint.store import save_checkpoint
from ..data.config import TokenizerKind
from ..data.huggingface_tokenizer import HuggingFaceTokenizer
from ..data.tokenizer_path import FILES
from ..data.tokenizer_types import Tokenizer
from ..moe.config import ModelConfig
from ..parallel.shard import LocalShard, whole
from ..train.config.serialize import plain_config
from .load_weights import HFSource, open_source, read_weights
from .tokenizer_json import open_tokenizer
from .upcycle import Upcycle, upcycle, upcycled_config

HF_FILES_FOLDER = "tokenizer_hf"
"""The folder in a checkpoint with the files that an export writes back unchanged."""
HF_FILES = (
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
    """The result of an import."""

    checkpoint: Path
    architecture: str
    parameters: int
    notes: list[str] = field(default_factory=list)
    """One line for each thing that could not be imported, and for settings that the folder does not say."""


def import_folder(path: Path, out: Path, upcycling: Upcycle | None = None) -> Imported:
    """Writes `out/step_00000000` with the model of the folder `path`; weights keep their stored types.

    Memory holds the model once. Raises ValueError, one line, before anything is written, for what has no place in our model.
    """
    if newest_checkpoint(out) or newest_checkpoint(out / "checkpoints"):
        raise ValueError(f"{out}: holds a checkpoint already; nearest valid: a new folder")
    source = open_source(path)
    _check_hf_files(path)
    if upcycling is not None:
        upcycled_config(source.model, upcycling)  # before the weights are read
    weights = read_weights(source)
    model = source.model if upcycling is None else upcycle(weights, source.model, upcycling)
    held = {f"model.{name}": LocalShard(whole(tensor.shape), tensor) for name, tensor in weights.items()}
    facts = _facts(source, model, upcycling)
    tokenizer, notes = _usable_tokenizer(path, model)
    notes += [source.family.training_note] if source.family.training_note else []
    kind = TokenizerKind.huggingface if isinstance(tokenizer, HuggingFaceTokenizer) else TokenizerKind.sentencepiece
    place = out.resolve() / "step_00000000" / "tokenizer" / FILES[kind]
    facts["config"]["tokenizer"] = {"kind": kind.value, "path": str(place)}
    checkpoint = save_checkpoint(out, 0, held, facts, attach=lambda folder: _attach_tokenizer(path, tokenizer, folder))
    parameters = sum(tensor.numel() for tensor in weights.values())
    return Imported(checkpoint, source.family.architecture, parameters, notes)


def _check_hf_files(path: Path) -> None:
    """Raises ValueError for one of HF_FILES that is larger than any tokenizer."""
    for file in (path / name for name in HF_FILES if (path / name).is_file()):
        if (size := file.stat().st_size) > LARGEST_TOKENIZER:
            raise ValueError(f"{file} has {size} bytes, more than {LARGEST_TOKENIZER}")


def _usable_tokenizer(path: Path, model: ModelConfig) -> tuple[Tokenizer | None, list[str]]:
    """Returns the tokenizer of the folder and no line, or None and a line that says why there is none for this model."""
    if not any((path / name).is_file() for name in FILES.values()):
        return None, ["no tokenizer: the folder has neither tokenizer.json nor tokenizer.model"]
    try:
        tokenizer = open_tokenizer(path)
        if tokenizer.size <= model.vocabulary:
            return tokenizer, []
        reason = f"it has {tokenizer.size} pieces, and the model {model.vocabulary} rows for them"
    except ValueError as error:
        reason = short_message(error)
    return None, [f"tokenizer: only carried along, tokenyard cannot use it ({reason})"]


def _attach_tokenizer(path: Path, tokenizer: Tokenizer | None, checkpoint: Path) -> None:
    """Copies HF_FILES into the checkpoint, for an export, and saves the tokenizer for everything else."""
    for name in (name for name in HF_FILES if (path / name).is_file()):
        (checkpoint / HF_FILES_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(path / name, checkpoint / HF_FILES_FOLDER / name)
    if tokenizer is not None:
        tokenizer.save(checkpoint / "tokenizer")


def _facts(source: HFSource, model: ModelConfig, upcycling: Upcycle | None) -> dict[str, Any]:
    """The manifest's facts of a run that has not begun. Settings that its configuration leaves out have their defaults."""
    origin: dict[str, Any] = {"architecture": source.family.architecture, "config": source.folder.config}
    if upcycling is not None:
        origin["upcycle"] = upcycling._asdict()
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
