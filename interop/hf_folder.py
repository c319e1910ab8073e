"""Reads and writes folders as published on Hugging Face: config.json and safetensors. Nothing in them is run or unpickled."""

import json
import logging
import math
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..checkpoint.bounded import (
    LONGEST_NAME,
    MOST_DIMENSIONS,
    brief,
    check_header,
    check_name,
    file_bytes,
    json_limit,
    read_regular,
    short_message,
    strict_json,
)
from ..checkpoint.safetensors_file import header_bytes
from .weight_mapping import HFTensor

log = logging.getLogger("tokenyard")
LARGEST_CONFIG = 1 << 20
"""Bytes of a config.json; published ones have some thousand."""
MOST_TENSORS = 1 << 20

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types that weights may have, by safetensors' codes."""

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
ADVICE = "only safetensors are read; transformers' save_pretrained writes them"


class Encoding(NamedTuple):
    """How a quantized tensor is stored; see quantized.py."""

    view: Callable[[Any, Any], Any]
    """Makes an object, whose `[ranges]` is a rectangle of the tensor, of its two stored ones."""
    values: tuple[str, str]
    """File and name of the tensor with its numbers."""
    scales: tuple[str, str]
    """File and name of the tensor with their scales."""


class TensorHeader(NamedTuple):
    """What the header of a safetensors file says about a tensor."""

    file: str
    code: str
    """safetensors' code of its type; see DTYPES."""
    shape: tuple[int, ...]
    encoding: Encoding | None = None
    """None: it is stored as it is."""
    key: str | None = None
    """Its name in the file, if it has another one in `HFFolder.tensors`."""


class HFFolder(NamedTuple):
    """A folder's config.json and the headers of its tensors."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorHeader]


def open_folder(path: Path) -> HFFolder:
    """Reads config.json and the headers of all files. Raises ValueError, one line, for what is missing, unsafe or contradictory."""
    if not (path / CONFIG).is_file():
        raise ValueError(f"{path}: must be a Hugging Face folder, it has no {CONFIG}")
    _refuse_links(path)
    return HFFolder(path, read_json(path / CONFIG), _tensors(path))


def _refuse_links(path: Path) -> None:
    """Raises ValueError for a link out of the folder, unless to the `blobs` of the same model, as in the hub's cache."""
    inside = [path.resolve()]
    if path.resolve().parent.name == "snapshots":
        inside.append(path.resolve().parent.parent / "blobs")
    for file in sorted(path.iterdir()):
        if file.is_symlink() and not any(file.resolve().is_relative_to(folder) for folder in inside):
            raise ValueError(
                f"{file}: is a link that leads out of its folder, to {file.readlink()}; nearest valid: a copy of that file"
            )


def read_json(path: Path, limit: int = LARGEST_CONFIG) -> dict[str, Any]:
    """Reads a file of at most `limit` bytes that holds one JSON object."""
    try:
        content = strict_json(read_regular(path, limit))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable JSON: {short_message(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """Opens a safetensors file. Closing it releases the pages that were read."""
    try:
        check_header(path)
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {short_message(error)}") from None
    with opened as file:
        yield file


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `path` at the end, or removed after an error. ValueError if `path` is not empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: must be a new or an empty folder")
    for old in path.parent.glob(f"{path.name}.tmp-*"):
        log.warning("removed %s, which an interrupted export had left", old)
        shutil.rmtree(old, ignore_errors=True)
    unfinished = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if path.exists():
            path.rmdir()
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _tensors(path: Path) -> dict[str, TensorHeader]:
    """The headers of all files that the index names, or of the only file if there is no index."""
    names = _indexed(path)
    found: dict[str, TensorHeader] = {}
    for name in sorted(set(names.values())) if names else _files(path):
        for key, stored in _header(path / name).items():
            if key in found:
                raise ValueError(f"{path}: tensor {key} stands in {found[key].file} and in {name}")
            found[key] = stored
    for key, name in names.items():
        if key not in found or found[key].file != name:
            raise ValueError(f"{path / name}: tensor {key} is missing, {INDEX} says that it is there")
    return found


def _indexed(path: Path) -> dict[str, str]:
    """The file of each tensor as the index says; empty without an index."""
    if not (path / INDEX).is_file():
        return {}
    names = read_json(path / INDEX, json_limit(file_bytes(path))).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{path / INDEX}: weight_map must name the file of each tensor")
    if len(names) > MOST_TENSORS:
        raise ValueError(f"{path / INDEX}: weight_map names {len(names)} tensors, more than {MOST_TENSORS}")
    for key in names:
        check_name(key)
    for name in names.values():
        if not isinstance(name, str) or len(name) > LONGEST_NAME or Path(name).name != name or Path(name).suffix != ".safetensors":
            raise ValueError(f"{path / INDEX}: weight_map={brief(name)}: must be the plain name of a .safetensors file. {ADVICE}")
    return names


def _files(path: Path) -> list[str]:
    if (path / SINGLE).is_file():
        return [SINGLE]
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)
    if pickled:
        raise ValueError(f"{path / pickled[0]}: is a pickle, which can run code; {ADVICE}")
    raise ValueError(f"{path}: has neither {SINGLE} nor {INDEX}")


def _header(path: Path) -> dict[str, TensorHeader]:
    with open_file(path) as file:
        names = list(file.keys())
        if len(names) > MOST_TENSORS:
            raise ValueError(f"{path} has {len(names)} tensors, more than {MOST_TENSORS}")
        views = {check_name(key): file.get_slice(key) for key in names}
        if wrong := next((key for key, view in views.items() if len(view.get_shape()) > MOST_DIMENSIONS), None):
            raise ValueError(f"{path}: tensor {brief(wrong)} has more than {MOST_DIMENSIONS} dimensions")
        return {key: TensorHeader(path.name, view.get_dtype(), tuple(view.get_shape())) for key, view in views.items()}


# Writes safetensors files as Hugging Face names them (model-00001-of-00003.safetensors) and their index, one tensor at a time.

SHARD_BYTES = 5_000_000_000
"""A file is not larger, unless one tensor is."""


class Output(NamedTuple):
    """A Hugging Face tensor to write, of parts of our tensors with their names, as `dtype`."""

    parts: Sequence[tuple[str, HFTensor]]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path, outputs: dict[str, Output], content: Callable[[Output], Iterator[memoryview]], shard_bytes: int
) -> list[str]:
    """Writes all `outputs`, by Hugging Face's names, and the index. Returns the names of the files.

    `content` yields the bytes of a tensor, one block after the other: memory holds no more of it.
    """
    shards = _cut(outputs, shard_bytes)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        with (folder / file).open("xb") as stream:
            stream.write(header_bytes({name: (outputs[name].dtype, outputs[name].shape) for name in names}))
            for name in names:
                for block in content(outputs[name]):
                    stream.write(block)
    index = {
        "metadata": {"total_size": sum(output.bytes for output in outputs.values())},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in sorted(names)},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return files


def _cut(outputs: dict[str, Output], shard_bytes: int) -> list[list[str]]:
    """The names of each file. Wider types come first, so that each tensor begins at a multiple of its element size."""
    shards: list[list[str]] = []
    room = 0
    for name in sorted(outputs, key=lambda name: -outputs[name].dtype.itemsize):
        if not shards or outputs[name].bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= outputs[name].bytes
    return shards
