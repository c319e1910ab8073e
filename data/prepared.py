"""Tokenized shards on disk: .npy files and a JSON manifest with their hashes, trained on by memory map."""

import json
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import xxhash

from .config import DataConfig
from .tokens import Manifest, Tokens

MANIFEST_FILE = "manifest.json"
FORMAT = "tokenyard tokens"
VERSION = 1


class ShardRecord(NamedTuple):
    """One .npy file of token ids, uint16 or uint32."""

    file: str
    tokens: int
    documents: int
    bytes: int
    """UTF-8 bytes of its documents."""
    hash: str
    """xxh3-128 of the ids."""
    bad: list[str]
    """Rows that were skipped: shard, row, reason."""


def open_prepared(config: DataConfig, tokenizer_hash: str, split: str) -> Tokens:
    """The shards of a split in the folder `data.path`, as one array. ValueError of one line if something does not fit."""
    folder = Path(config.path or "").expanduser()
    about = read_manifest(folder)
    if about["tokenizer_hash"] != tokenizer_hash:
        has = f"tokenizer {about['tokenizer_hash']}, and this one is {tokenizer_hash}"
        raise ValueError(f"data.path={folder} was made with {has}; take its own: {tokenizer_words(folder)}")
    records = [ShardRecord(**record) for record in about["splits"][split]]
    ids = JoinedArrays([_open(folder, record) for record in records])
    running = xxhash.xxh3_128(tokenizer_hash.encode() + b"".join(record.hash.encode() for record in records))
    documents, size = sum(record.documents for record in records), sum(record.bytes for record in records)
    return Tokens(ids, Manifest(documents, len(ids), size, [], 0, 0, running.hexdigest()))  # pyright: ignore[reportArgumentType]


def read_manifest(folder: Path) -> dict[str, Any]:
    """ValueError of one line if the folder holds none of ours."""
    try:
        about = json.loads((folder / MANIFEST_FILE).read_text())
        known = about["format"] == FORMAT and about["version"] == VERSION
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"data.path={folder} must be a folder that tokenyard prepare has finished ({error})") from None
    if not known:
        raise ValueError(f"data.path={folder} must hold version {VERSION} of '{FORMAT}', and it is {about['version']}")
    return about


def verify(folder: Path) -> list[str]:
    """The files whose ids are not those that were written."""
    about = read_manifest(folder)
    records = [ShardRecord(**record) for split in about["splits"].values() for record in split]
    return [record.file for record in records if xxhash.xxh3_128_hexdigest(_open(folder, record).tobytes()) != record.hash]


def tokenizer_words(folder: Path) -> str:
    """The overrides that name the tokenizer that lies beside the shards."""
    for name, kind in (("tokenizer.model", "sentencepiece"), ("tokenizer.json", "huggingface")):
        if (folder / "tokenizer" / name).is_file():
            return f"tokenizer.kind={kind} tokenizer.path={folder / 'tokenizer' / name}"
    return "tokenizer.kind=bytes"


@final
class JoinedArrays:
    """Several memory-mapped arrays as one. Indexed by arrays of places, or by slices, as a numpy array is."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self._arrays = arrays
        self._starts = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, places: np.ndarray | slice) -> np.ndarray:
        if isinstance(places, slice):
            places = np.arange(*places.indices(len(self)))
        which = np.searchsorted(self._starts, places, side="right") - 1
        found = np.empty(places.shape, dtype=self._arrays[0].dtype)
        for index in np.unique(which):
            inside = which == index
            found[inside] = self._arrays[index][places[inside] - self._starts[index]]
        return found


def _open(folder: Path, record: ShardRecord) -> np.ndarray:
    path = folder / record.file
    if path.parent != folder:
        raise ValueError(f"{folder / MANIFEST_FILE} names a file outside of its folder: {record.file}")
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); make it again with tokenyard prepare") from None
    if ids.shape != (record.tokens,):
        raise ValueError(f"{path} is damaged: {ids.shape} for {record.tokens} ids; make it again with tokenyard prepare")
    return ids
