"""manifest.json: what a checkpoint holds and in which file. Nothing in it is trusted before `read_manifest` has checked it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from .shards import DTYPES, sync

MANIFEST = "manifest.json"
FORMAT = "tokenyard checkpoint"
VERSION = 1


class FileRecord(NamedTuple):
    """Size of a file and the xxh3-128 hash of its bytes, in hexadecimal digits."""

    bytes: int
    hash: str


class ChunkRecord(NamedTuple):
    """A rectangle of a tensor: the tensor `key` of the safetensors file `file`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str


class TensorRecord(NamedTuple):
    """A tensor: its dtype (the code that safetensors uses), global shape and rectangles. Empty ones are not stored."""

    dtype: str
    shape: tuple[int, ...]
    chunks: list[ChunkRecord]


class Manifest(NamedTuple):
    """All that is known of a checkpoint without opening another file."""

    step: int
    facts: dict[str, Any]
    tensors: dict[str, TensorRecord]
    files: dict[str, FileRecord]


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest` to the new file `path`, durably."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "facts": manifest.facts,
        "tensors": {
            name: {"dtype": record.dtype, "shape": record.shape, "chunks": [chunk._asdict() for chunk in record.chunks]}
            for name, record in manifest.tensors.items()
        },
        "files": {name: record._asdict() for name, record in manifest.files.items()},
    }
    content["hash"] = _hash(content)
    with path.open("x", encoding="ascii") as file:
        # One line per tensor and file: as good as indented to a reader's eye, and a fifth of the bytes.
        file.write(_lines(content))
        sync(file)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint `folder`. ValueError if it is missing, damaged, of another version or unsafe."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable JSON: {error}") from None
    try:
        manifest = _parse(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return manifest


def checked_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """`facts` as they will be read again. ValueError if they are no plain JSON."""
    try:
        return json.loads(json.dumps(facts, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the facts of a checkpoint must be plain JSON: {error}") from None


def _parse(content: Any) -> Manifest:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"not the manifest of a tokenyard checkpoint: format must be {FORMAT!r}")
    if content["version"] != VERSION:
        raise ValueError(f"version = {content['version']!r} cannot be read: it must be {VERSION}")
    files = {_inside(name): FileRecord(_count(one["bytes"]), str(one["hash"])) for name, one in content["files"].items()}
    tensors = {name: _tensor(name, one, files) for name, one in content["tensors"].items()}
    if content["hash"] != _hash({key: value for key, value in content.items() if key != "hash"}):
        raise ValueError("damaged or changed by hand: its content does not have the hash that it states")
    return Manifest(_count(content["step"]), dict(content["facts"]), tensors, files)


def _tensor(name: str, one: dict[str, Any], files: dict[str, FileRecord]) -> TensorRecord:
    if one["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name!r}: dtype = {one['dtype']!r} must be one of {', '.join(DTYPES)}")
    shape = _counts(one["shape"])
    chunks = [
        ChunkRecord(_counts(chunk["offsets"]), _counts(chunk["sizes"]), _inside(chunk["file"]), str(chunk["key"]))
        for chunk in one["chunks"]
    ]
    for chunk in chunks:
        if chunk.file not in files:
            raise ValueError(f"tensor {name!r}: file {chunk.file!r} must be listed under files")
        if not len(chunk.offsets) == len(chunk.sizes) == len(shape):
            raise ValueError(f"tensor {name!r}: the offsets and sizes of a chunk must have {len(shape)} dimensions")
    return TensorRecord(one["dtype"], shape, chunks)


def _inside(name: str) -> str:
    """A file's name, if it is a plain one: so it lies in the checkpoint's folder."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"file {name!r} must be a plain name, of a file in the checkpoint's own folder")
    return name


def _counts(values: list[Any]) -> tuple[int, ...]:
    return tuple(_count(value) for value in values)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} must be a whole number >= 0")
    return value


def _hash(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _lines(content: dict[str, Any]) -> str:
    parts = []
    for key, value in content.items():
        text = json.dumps(value)
        if key in ("tensors", "files") and value:
            text = "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in value.items()) + "\n}"
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
