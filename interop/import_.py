"""`tokenyard import`: makes a checkpoint of a Hugging Face folder, as it is or with experts made of each feed-forward."""

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.bounded import LARGEST_TOKENIZER, short_message
from ..checkpoint.folder import newest_checkpoint
from ..checkpoint.manifest import PREFIX
from ..checkpoint.store import save_checkpoint
from ..data.config import TokenizerKind
from ..data.huggingface_tokenizer import HuggingFaceTokenizer
from ..data.tokenizer_path import FILES
from ..data.tokenizer_types import Tokenizer
from ..moe.config import ModelConfig
from ..parallel.shard import LocalShard, whole
from ..train.config.serialize import plain_config
from .load_weights import HFSource, check_repeated, open_source, read_shards, stored_dtypes
from .tokenizer_json import open_tokenizer
from .upcycle import Upcycle, upcycle, upcycled_config
from .weight_plan import Plan

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
    """One line for each thing that could not be imported, or was changed, and for settings that the folder does not say."""


def import_folder(
    path: Path, out: Path, upcycling: Upcycle | None = None, progress: Callable[[int, int], None] | None = None
) -> Imported:
    """Writes `out/step_00000000` with the model of the folder `path`; weights keep their stored types, quantized ones become bf16.

    Memory holds one tensor of ours at a time, or the whole model if it is upcycled. `progress(done, total)` is called after each,
    with numbers of weights. Raises ValueError, one line, before anything is written, for what has no place in our model.
    """
    if newest_checkpoint(out) or newest_checkpoint(out / "checkpoints"):
        raise ValueError(f"{out}: holds a checkpoint already; nearest valid: a new folder")
    source = open_source(path)
    for file in (path / name for name in HF_FILES if (path / name).is_file()):
        if (size := file.stat().st_size) > LARGEST_TOKENIZER:
            raise ValueError(f"{file} has {size} bytes, more than {LARGEST_TOKENIZER}")
    if upcycling is not None:
        upcycled_config(source.model, upcycling)  # before the weights are read
    check_repeated(source)
    reader = _Reader(source, progress)
    model, weights = source.model, reader.on_meta
    if upcycling is not None:
        weights = {name: reader.read(name) for name in weights}
        model = upcycle(weights, model, upcycling)
    held = {f"{PREFIX}{name}": LocalShard(whole(tensor.shape), tensor) for name, tensor in weights.items()}
    facts = _facts(source, model, upcycling)
    tokenizer, notes = _usable_tokenizer(path, model)
    notes += _changes(source) + ([source.family.training_note] if source.family.training_note else [])
    kind = TokenizerKind.huggingface if isinstance(tokenizer, HuggingFaceTokenizer) else TokenizerKind.sentencepiece
    place = out.resolve() / "step_00000000" / "tokenizer" / FILES[kind]
    facts["config"]["tokenizer"] = {"kind": kind.value, "path": str(place)}
    checkpoint = save_checkpoint(
        out,
        0,
        held,
        facts,
        attach=lambda folder: _attach_tokenizer(path, tokenizer, folder),
        limit_seconds=math.inf,
        read=(lambda name: reader.read(name.removeprefix(PREFIX))) if upcycling is None else None,
    )
    parameters = sum(tensor.numel() for tensor in weights.values())
    return Imported(checkpoint, source.family.architecture, parameters, notes)


def _changes(source: HFSource) -> list[str]:
    """Returns a line about the tensors that were quantized, and one about those that the family leaves out."""
    folder, family, notes = source.folder, source.family, []
    quantized = [name for name, header in folder.tensors.items() if header.encoding is not None]
    if quantized:
        notes.append(f"{len(quantized)} tensors of {folder.config['quantization_config']['quant_method']} are bf16 now")
    left_out = [name for name in folder.tensors if name not in source.plan and re.fullmatch(family.left_out, name)]
    if left_out:
        notes.append(f"{len(left_out)} tensors have no place in the model and were left out, such as {left_out[0]}")
    return notes


class _Reader:
    """The tensors of a source, in the types of its files, one after the other."""

    def __init__(self, source: HFSource, progress: Callable[[int, int], None] | None) -> None:
        dtypes = stored_dtypes(source)
        self.on_meta = {name: tensor.to(dtypes[name]) for name, tensor in source.ours.items()}
        self._source, self._progress = source, progress
        self._plans: dict[str, Plan] = {name: {} for name in source.ours}
        for name, parts in source.plan.items():
            for planned in parts:
                self._plans[planned.ours].setdefault(name, []).append(planned)
        self._done, self._total = 0, sum(tensor.numel() for tensor in source.ours.values())

    def read(self, name: str) -> Tensor:
        """Returns our tensor `name`."""
        tensor = torch.empty_like(self.on_meta[name], device="cpu")
        read_shards(self._source._replace(plan=self._plans[name]), {name: LocalShard(whole(tensor.shape), tensor)}, complete=False)
        self._done += tensor.numel()
        if self._progress is not None:
            self._progress(self._done, self._total)
        return tensor


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
