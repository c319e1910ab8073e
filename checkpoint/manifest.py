"""manifest.json: what a checkpoint holds and in which file. `read_manifest` trusts nothing in it unchecked.

No torch here: a wrong `checkpoint.resume` is refused before torch is imported.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from ..moe.config import ModelConfig
from ..moe.param_shapes import shapes
from ..parallel.shard import ShardMetadata, disjoint
from .bounded import LEAST_LIMIT, brief, check_name, file_bytes, json_limit, read_regular, short_message, strict_json
from .facts import check_facts
from .fsync import sync
from .tensor_groups import (
    ITEM_BYTES,
    ChunkRecord,
    TensorRecord,
    a_list,
    count,
    counts,
    file_of_rank,
    groups_of,
    parse_group,
    plain_group,
)

MANIFEST = "manifest.json"
FORMAT = "tokenyard checkpoint"
VERSION = 2
"""Of what is written. In version 1, which is read, each tensor lists its chunks, and hashes of experts are defined otherwise."""
LARGEST_MANIFEST = 1 << 30
"""Bytes; a smaller limit follows from the files that it may describe."""
MOST_TENSORS = 1 << 17
"""More than a thousand layers have, with both their moments."""
STEP_FOLDER = re.compile(r"step_(\d{8,})")
"""Name of a checkpoint's folder."""


class DamagedCheckpoint(ValueError):
    """A checkpoint is not what was written: `file` is missing, changed or unsafe."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, " ".join(reason.split())

    def __str__(self) -> str:
        return self.reason


class NoManifest(DamagedCheckpoint):
    """The manifest is missing, or not one that tokenyard writes: nothing of the checkpoint can be used."""


class FileRecord(NamedTuple):
    """Size of a file and the xxh3-128 hash of its bytes, in hexadecimal digits."""

    bytes: int
    hash: str


@dataclass
class Manifest:
    """The content of manifest.json."""

    step: int
    facts: dict[str, Any]
    tensors: dict[str, TensorRecord]
    files: dict[str, FileRecord]
    attachments: dict[str, FileRecord] = field(default_factory=dict)
    """Other files than those of tensors, such as the tokenizer's, by `folder/name`."""
    experts: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """By layer and kind of tensor, the hash of each expert by global id (expert_hashes.py)."""
    version: int = VERSION


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes `manifest` to the new file `path`, durably."""
    assert manifest.version == VERSION
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "facts": manifest.facts,
        "tensors": [plain_group(group) for group in groups_of(manifest.tensors)],
        "files": {name: record._asdict() for name, record in manifest.files.items()},
        "attachments": {name: record._asdict() for name, record in manifest.attachments.items()},
        "experts": manifest.experts,
    }
    content["hash"] = _hash(content)
    with path.open("x", encoding="ascii") as file:
        # One line for each group of tensors and each file is as readable as indented JSON, in a fifth of the bytes.
        file.write(_lines(content))
        sync(file)


def read_manifest(folder: Path) -> Manifest:
    """Returns the manifest of the checkpoint `folder`.

    Raises NoManifest if it is missing, damaged, unsafe or of another version.
    """
    path = Path(folder) / MANIFEST
    try:
        large = path.stat().st_size > LEAST_LIMIT  # only then the other files are looked at
        content = strict_json(read_regular(path, min(LARGEST_MANIFEST, json_limit(file_bytes(path.parent) if large else 0))))
    except (FileNotFoundError, NotADirectoryError):
        raise NoManifest(path, f"{folder} is no checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise NoManifest(path, f"{path} is no readable JSON: {short_message(error)}") from None
    try:
        manifest = _parse(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise NoManifest(path, f"{path} is damaged: {type(error).__name__}: {str(error)[:60]}") from None
    except ValueError as error:
        raise NoManifest(path, f"{path}: {short_message(error)}") from None
    named = STEP_FOLDER.fullmatch(path.parent.name)
    if named and int(named[1]) != manifest.step:
        raise NoManifest(path, f"{path} is of step {manifest.step}, and its folder is called {path.parent.name}")
    return manifest


def json_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """Returns `facts` as they will be read again. Raises ValueError if they are not JSON."""
    try:
        return json.loads(json.dumps(facts, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the facts of a checkpoint must be plain JSON: {error}") from None


def check_sizes(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Raises DamagedCheckpoint if one of the files `names` (None: all) is missing or has another size than the manifest says."""
    listed = manifest.files | manifest.attachments
    for name in sorted(listed if names is None else names):
        path, expected = folder / name, listed[name].bytes
        if path.is_symlink() or path.parent.is_symlink() or (path.exists() and not path.is_file()):
            raise DamagedCheckpoint(path, f"checkpoint file {path} is no regular file: nothing in a checkpoint may be a link")
        if not path.exists():
            raise DamagedCheckpoint(path, f"checkpoint file {path} is missing: {MANIFEST} lists it with {expected} bytes")
        if (size := path.stat().st_size) != expected:
            reason = f"checkpoint file {path} is damaged: it has {size} bytes and {MANIFEST} says {expected}"
            raise DamagedCheckpoint(path, reason)


def check_unlisted(path: Path, manifest: Manifest) -> None:
    """Raises DamagedCheckpoint for a file or link in the folder that the manifest does not list."""
    listed = {MANIFEST, *manifest.files, *manifest.attachments}
    for found in sorted(path.rglob("*")):
        if (found.is_symlink() or not found.is_dir()) and found.relative_to(path).as_posix() not in listed:
            raise DamagedCheckpoint(found, f"checkpoint file {found} is not listed in {MANIFEST}")


def _parse(content: Any) -> Manifest:
    """Checks the whole schema: every key that a manifest may have is read here."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"not the manifest of a tokenyard checkpoint: format must be {FORMAT!r}")
    version = content["version"]
    if version not in (1, VERSION) or type(version) is not int:
        raise ValueError(f"version = {brief(version)} cannot be read: it must be {VERSION} or 1")
    files = {_inside(name): _file(one) for name, one in _object(content, "files").items()}
    attachments = {_attached(name): _file(one) for name, one in _object(content, "attachments", optional=True).items()}
    tensors = _tensors_of_version_1(content, files) if version == 1 else _tensors(content, files)
    if len(tensors) > MOST_TENSORS:
        raise ValueError(f"{len(tensors)} tensors are more than the {MOST_TENSORS} that a checkpoint may have")
    experts = {
        layer: {kind: [_string(value) for value in a_list(hashes)] for kind, hashes in kinds.items()}
        for layer, kinds in _object(content, "experts", optional=True).items()
    }
    step, facts = count(content["step"]), check_facts(content["facts"])
    if facts.get("step", step) != step:
        raise ValueError(f"step = {step} must be facts.step = {facts['step']}")
    if content["hash"] != _hash({key: value for key, value in content.items() if key != "hash"}):
        raise ValueError("damaged or changed by hand: its content does not have the hash that it states")
    return Manifest(step, facts, tensors, files, attachments, experts, version)


def _object(content: dict[str, Any], name: str, optional: bool = False) -> dict[str, Any]:
    value = content.get(name, {}) if optional else content[name]
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object")
    return value


def _file(one: dict[str, Any]) -> FileRecord:
    return FileRecord(count(one["bytes"]), _string(one["hash"]))


def _tensors(content: dict[str, Any], files: dict[str, FileRecord]) -> dict[str, TensorRecord]:
    groups = [parse_group(one) for one in a_list(content["tensors"])]
    tensors: dict[str, TensorRecord] = {}
    needed: Counter[int] = Counter()
    for group in groups:
        made = group.records()
        if twice := made.keys() & tensors.keys():
            raise ValueError(f"tensor {min(twice)!r} is described twice")
        tensors |= made
        for file, size in group.bytes_by_file():
            needed[file] += size
    for file in needed:
        if file_of_rank(file) not in files:
            raise ValueError(f"file {file_of_rank(file)!r} must be listed under files, since tensors are in it")
    _check_room({file_of_rank(file): size for file, size in needed.items()}, files)
    return tensors


def _tensors_of_version_1(content: dict[str, Any], files: dict[str, FileRecord]) -> dict[str, TensorRecord]:
    tensors = {check_name(name): _tensor(name, one, files) for name, one in _object(content, "tensors").items()}
    needed: Counter[str] = Counter()
    for record in tensors.values():
        for chunk in record.chunks:
            needed[chunk.file] += math.prod(chunk.metadata.sizes) * ITEM_BYTES[record.dtype]
    _check_room(needed, files)
    return tensors


def _tensor(name: str, one: dict[str, Any], files: dict[str, FileRecord]) -> TensorRecord:
    if _string(one["dtype"]) not in ITEM_BYTES:
        raise ValueError(f"tensor {name!r}: dtype = {brief(one['dtype'])} must be one of {', '.join(ITEM_BYTES)}")
    shape = counts(one["shape"])
    chunks = [
        ChunkRecord(
            ShardMetadata(shape, counts(chunk["offsets"]), counts(chunk["sizes"])),
            _inside(chunk["file"]),
            check_name(chunk["key"]),
        )
        for chunk in a_list(one["chunks"])
    ]
    for (_, offsets, sizes), file, _ in chunks:
        if file not in files:
            raise ValueError(f"tensor {name!r}: file {file!r} must be listed under files")
        if not len(offsets) == len(sizes) == len(shape):
            raise ValueError(f"tensor {name!r}: the offsets and sizes of a chunk must have {len(shape)} dimensions")
        if any(offset + size > extent for offset, size, extent in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"tensor {name!r}: a chunk must lie inside of the shape {shape}")
        if 0 in sizes:
            raise ValueError(f"tensor {name!r}: a chunk must hold something")
    covered, total = sum(math.prod(chunk.metadata.sizes) for chunk in chunks), math.prod(shape)
    if covered != total or not disjoint([chunk.metadata for chunk in chunks]):
        raise ValueError(f"tensor {name!r} is incomplete: its chunks must cover each of its {total} elements once")
    return TensorRecord(one["dtype"], shape, chunks)


def _check_room(needed: Mapping[str, int], files: dict[str, FileRecord]) -> None:
    """Raises ValueError if a file would hold more than its bytes, so no tensor takes more memory than there are bytes in files."""
    for name, size in needed.items():
        if size > files[name].bytes:
            raise ValueError(f"file {name!r} is said to hold {size} bytes of tensors in {files[name].bytes}")


def _inside(name: Any) -> str:
    """Returns a file's name. Raises ValueError unless it is a plain one, of a file in the checkpoint's own folder."""
    if check_name(name) in (".", "..") or "/" in name or "\\" in name or len(name) > 255:
        raise ValueError(f"file {brief(name)} must be a plain name, of a file in the checkpoint's own folder")
    return name


def _attached(name: str) -> str:
    """Returns `folder/name`. Raises ValueError unless both are plain names."""
    return "/".join(_inside(part) for part in name.split("/", maxsplit=1))


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{brief(value)} must be a text")
    return value


def _hash(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _lines(content: dict[str, Any]) -> str:
    """Returns JSON with one line for each group of tensors, file and layer."""
    parts = []
    for key, value in content.items():
        text = json.dumps(value)
        if key == "tensors" and value:
            text = "[\n" + ",\n".join(f"  {json.dumps(one)}" for one in value) + "\n]"
        if key in ("files", "attachments", "experts") and value:
            text = "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in value.items()) + "\n}"
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


# Does a checkpoint hold the tensors of the model that its configuration describes? Checked before any is allocated.

PREFIX = "model."
BIAS = ".expert_bias"
"""Ending of the one kind of tensor that a model may hold in addition to its parameters: a number for each output of the router."""


def check_fits(model: ModelConfig, tensors: Mapping[str, TensorRecord], path: Any) -> None:
    """Raises ValueError if `tensors` lack a parameter of `model`, have it in another shape, or hold one that the model lacks."""
    stored = {name.removeprefix(PREFIX): record.shape for name, record in tensors.items() if name.startswith(PREFIX)}
    try:
        if model.layers > len(stored):
            raise ValueError(f"model.layers={model.layers}: {path} holds {len(stored)} tensors")
        wanted = shapes(model)
    except (ArithmeticError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {path}: its configuration makes no model: {error}") from None
    for name, shape in wanted.items():
        if stored.get(name) != shape:
            there = f"has the shape {stored[name]}" if name in stored else "is missing"
            raise ValueError(f"checkpoint {path}: tensor {brief(PREFIX + name)} must be {shape} by its configuration and {there}")
    for name in stored.keys() - wanted.keys():
        router = wanted.get(name.removesuffix(BIAS) + ".weight")
        if not name.endswith(BIAS) or router is None or stored[name] != router[:1]:
            raise ValueError(
                f"checkpoint {path}: tensor {brief(PREFIX + name)} is none of the model that its configuration describes"
            )
