"""`tokenyard export`: makes a Hugging Face folder of a checkpoint that any layout wrote."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.manifest import PREFIX, Manifest, check_fits, read_manifest
from ..checkpoint.safetensors_file import content_of
from ..checkpoint.store import checkpoint_at
from ..checkpoint.tensor_reader import TensorReader, weights_on_meta
from ..checkpoint.verify import check_files
from ..data.tokenizer import load_tokenizer
from ..moe.config import ModelConfig, RopeScaling
from ..moe.model import Transformer
from ..parallel.failpoints import failpoint
from ..parallel.shard import LocalShard, ShardMetadata
from ..train.config.serialize import config_from_plain
from .config_mapping import choose_family, write_config
from .families import FAMILIES, Family
from .families.harmless import IRRELEVANT
from .hf_folder import CONFIG, SHARD_BYTES, Output, new_folder, write_shards
from .import_ import HF_FILES, HF_FILES_FOLDER
from .load_weights import place_of, rectangle_of
from .tokenizer_json import write_tokenizer
from .weight_plan import repeated_tensors, write_plan

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EXPERT_BIAS = "router.expert_bias"
GENERATION = "generation_config.json"
BLOCK_BYTES = 1 << 24
"""Of a tensor as the checkpoint stores it, in memory at a time; one index of its first dimension is the least."""
PAGES_BYTES = 1 << 25
"""Bytes read from the checkpoint's files before they are opened anew."""


@dataclass
class Exported:
    """The result of an export."""

    folder: Path
    architecture: str
    dtype: str
    files: list[str]
    bytes: int
    """Of the files, which are those of the weights."""
    notes: list[str] = field(default_factory=list)
    """One line for each thing that could not be exported, or means something else there."""


def export_checkpoint(
    path: Path,
    folder: Path,
    dtype: str | None = None,
    architecture: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
    finish: Callable[[Exported, Path], None] = lambda made, unfinished: None,
) -> Exported:
    """Writes the new folder `folder`, complete or not at all. Memory holds a block of one tensor at a time (BLOCK_BYTES).

    dtype: bf16 or fp32; None keeps the stored types. architecture: one of FAMILIES; None takes the one that the model was imported
    from, or the first that can express it. `progress(done, total)`: bytes that were checked or written. `finish` may add files to
    the unfinished folder. ValueError, one line, for a setting or tensor that the architecture cannot express.
    """
    checkpoint = checkpoint_at(path)
    manifest = read_manifest(checkpoint)
    model, ours = _model(checkpoint, manifest), weights_on_meta(manifest)
    family = _family(model, manifest.facts, architecture)
    config = _irrelevant_keys(manifest.facts, family, model)
    if model.attention.rope.scaling is RopeScaling.dynamic:
        del config["max_position_embeddings"]  # it decides angles
    config = write_config(family, model) | config
    _check_complete(model, ours, checkpoint)
    outputs = _outputs(family, model, ours, DTYPES[dtype] if dtype else None)
    config["dtype"] = str(outputs[next(iter(outputs))].dtype).removeprefix("torch.")
    stored = sum(record.bytes for record in (manifest.files | manifest.attachments).values())
    done, total = 0, stored + sum(output.bytes for output in outputs.values())

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    def content(output: Output) -> Iterator[memoryview]:
        for block in _content(output, ours, pages.read):
            yield block
            count(block.nbytes)

    with new_folder(folder) as unfinished:
        check_files(checkpoint, manifest, count=count)
        with closing(_Pages(checkpoint, manifest)) as pages:
            files = write_shards(unfinished, outputs, content, shard_bytes)
        failpoint("export.half", manifest.step)
        notes = _write_tokenizer(checkpoint, manifest, unfinished, config)
        _write_json(unfinished / CONFIG, config)
        if model.mtp_depth and not model.mtp_after_norm:
            what = "the prediction modules have learned from hidden states before the last norm"
            notes.append(f"model.mtp_after_norm=false: {what}, {family.architecture} feeds them those after it")
        if idle := family.idle(model):
            copies = f"{len(idle)} tensors, as {next(iter(idle))}, are copies of others"
            notes.append(f"{copies}: transformers has them and never uses them")
        size = sum((unfinished / file).stat().st_size for file in files)
        made = Exported(folder, family.architecture, config["dtype"], files, size, notes)
        finish(made, unfinished)
    return made


def _model(checkpoint: Path, manifest: Manifest) -> ModelConfig:
    plain = manifest.facts.get("config", {}).get("model")
    if plain is None:
        raise ValueError(f"{checkpoint}: must say the configuration of its model")
    model = config_from_plain({"model": plain}).model
    check_fits(model, manifest.tensors, checkpoint)
    if model.moe.balance.bias_rate == 0 and any(name.endswith(EXPERT_BIAS) for name in manifest.tensors):
        model.moe.balance.bias_rate = 0.001  # an earlier run trained the bias; with any rate above 0 the model has one
    return model


def _family(model: ModelConfig, facts: dict[str, Any], architecture: str | None) -> Family:
    if architecture is None:
        return choose_family(model, facts.get("source", {}).get("architecture"))
    if architecture not in FAMILIES:
        raise ValueError(f"--architecture={architecture}: must be one of {', '.join(FAMILIES)}")
    return FAMILIES[architecture]


def _irrelevant_keys(facts: dict[str, Any], family: Family, model: ModelConfig) -> dict[str, Any]:
    """Keys that do not change the model's function, from the folder that was imported, or else from the run's configuration."""
    origin = facts.get("source", {}).get("config")
    if origin is not None:
        return {key: origin[key] for key in IRRELEVANT & family.defaults.keys() & origin.keys()}
    length, rope = facts["config"].get("sequence_length", 256), model.attention.rope
    if rope.scaling is not RopeScaling.none:
        length = max(length, int(rope.factor * rope.original_length))
    return {"max_position_embeddings": length, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _check_complete(model: ModelConfig, ours: dict[str, Tensor], checkpoint: Path) -> None:
    """Raises ValueError unless the checkpoint holds exactly the tensors that its own configuration asks for."""
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in Transformer(model).state_dict().items()}
    for name in sorted(wanted.keys() | ours.keys()):
        if name not in ours:
            raise ValueError(f"{checkpoint}: tensor {name} is missing")
        if name not in wanted:
            raise ValueError(f"{checkpoint}: tensor {name} is no tensor of its model")
        if wanted[name] != ours[name].shape:
            raise ValueError(f"{checkpoint}: tensor {name} has the shape {tuple(ours[name].shape)}: must be {tuple(wanted[name])}")


def _outputs(family: Family, model: ModelConfig, ours: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Output]:
    """The tensors to write, by Hugging Face's names. Expert biases stay in fp32."""
    plan = write_plan(family, model, ours)
    for name, original in repeated_tensors(model).items():
        if name != "lm_head.weight":
            plan[name] = plan[original]
    plan |= {name: plan[original] for name, original in family.idle(model).items()}
    outputs = {}
    for name, parts in plan.items():
        mine, part = parts[0]
        stored = ours[mine].dtype if dtype is None or mine.endswith(EXPERT_BIAS) else dtype
        outputs[name] = Output(parts, stored, part.shape(ours[mine]))
    return outputs


def _content(output: Output, ours: dict[str, Tensor], read: Callable[[str, ShardMetadata], Tensor]) -> Iterator[memoryview]:
    """Yields the bytes of a Hugging Face tensor in blocks of its first dimension, each of rectangles of ours that it needs."""
    for name, part in sorted(output.parts, key=lambda each: each[1].rows.begin if each[1].rows else 0):
        shape, stored = tuple(ours[name].shape), ours[name].dtype
        rows, *others = part.view(ours[name]).shape or (1,)
        step = max(1, BLOCK_BYTES // max(1, math.prod(others) * stored.itemsize))
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            metadata = rectangle_of(part, shape, begin, end)
            place = place_of(part, LocalShard(metadata, read(name, metadata)))
            assert place is not None and place.target.numel() == (end - begin) * math.prod(others), f"{part.name}: not a rectangle"
            yield content_of(place.target.to(output.dtype))


class _Pages:
    """Reads rectangles of the model's tensors. Opens the files anew after PAGES_BYTES, so that few pages of them stay in memory."""

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        self._checkpoint, self._manifest = checkpoint, manifest
        self._reader, self._read = TensorReader(checkpoint, manifest.tensors), 0

    def read(self, name: str, metadata: ShardMetadata) -> Tensor:
        if self._read > PAGES_BYTES:
            self.close()
        found = self._reader.read(PREFIX + name, metadata)
        self._read += found.nbytes
        return found

    def close(self) -> None:
        self._reader.__exit__()
        self._read = 0


def _write_tokenizer(checkpoint: Path, manifest: Manifest, folder: Path, config: dict[str, Any]) -> list[str]:
    """Writes the files that an import kept, or those of our tokenizer. Returns a line for each that is missing."""
    kept = [name for name in HF_FILES if f"{HF_FILES_FOLDER}/{name}" in manifest.attachments]
    notes = []
    if kept:  # `check_files` has checked their hashes, and that they are no links
        for name in kept:
            shutil.copyfile(checkpoint / HF_FILES_FOLDER / name, folder / name, follow_symlinks=False)
    else:
        try:
            tokenizer = load_tokenizer(checkpoint / "tokenizer")
            config |= tokenizer.special_ids()
            write_tokenizer(tokenizer, folder)
        except ValueError as error:
            notes.append(f"no tokenizer: {error}")
    if not (folder / GENERATION).is_file():
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
        _write_json(folder / GENERATION, {"_from_model_config": True, **ids})
    return notes


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(dict(sorted(content.items())), indent=2) + "\n")
