"""Pretokenized shards on disk: memory-mapped .npy files and a JSON manifest with their hashes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from stat import S_ISREG
from typing import Any, final

import numpy as np
import xxhash

from .config import DataConfig
from .token_array import ShardRecord, TokenArray, TokensManifest, TokensPlace, hash_ids, map_tokens
from .tokenizer import settings_of_saved

MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
FORMAT = "tokenyard tokens"
VERSION = 2
AGAIN = "remove it and start tokenyard prepare again"
"""Advice in messages about damage."""


def open_place(place: TokensPlace, verify: bool) -> TokenArray:
    """Returns tokens that another process has opened. Shards are opened, and with `verify` hashed, when they are first read.

    Raises ValueError, one line, if a file of tokens has another number of them.
    """
    if place.shards is None:
        return map_tokens(place)
    folder, records = Path(place.path), place.shards
    check = (lambda index, ids: _check_hash(folder, records[index], ids)) if verify else None
    ids = ConcatenatedArrays([record.tokens for record in records], lambda index: _open(folder, records[index]), check)
    return TokenArray(ids, place.manifest, place)  # pyright: ignore[reportArgumentType]


def open_pretokenized(config: DataConfig, tokenizer_hash: str, split: str) -> TokenArray:
    """Returns the shards of a split in the folder `data.path`, as one array. Raises ValueError, one line, if they are damaged.

    Checks sizes and the manifest's own hash; with `data.verify` also the hash of each shard, when it is first read.
    """
    folder = Path(config.path or "").expanduser()
    about = read_manifest(folder)
    if about["tokenizer_hash"] != tokenizer_hash:
        has = f"tokenizer {about['tokenizer_hash']}, and this one is {tokenizer_hash}"
        raise ValueError(f"data.path={folder} was made with {has}; take its own: {tokenizer_overrides(folder)}")
    records = [ShardRecord(**record) for record in about["splits"][split]]
    running = xxhash.xxh3_128(tokenizer_hash.encode() + b"".join(record.hash.encode() for record in records))
    documents, tokens = sum(record.documents for record in records), sum(record.tokens for record in records)
    size, bad = sum(record.bytes for record in records), [row for record in records for row in record.bad]
    manifest = TokensManifest(documents, tokens, size, bad, 0, 0, running.hexdigest())
    opened = open_place(TokensPlace(str(folder), manifest, records), config.verify)
    assert isinstance(opened.ids, ConcatenatedArrays)
    opened.ids.open_all()
    return opened


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a folder of pretokenized shards. Raises ValueError, one line, if it is missing or damaged."""
    path = folder / MANIFEST_FILE
    try:
        about = json.loads(path.read_text())
        known, version = about["format"] == FORMAT and about["version"] == VERSION, about["version"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"data.path={folder} must be a folder that tokenyard prepare has finished ({error})") from None
    if not known:
        raise ValueError(
            f"data.path={folder} must hold version {VERSION} of '{FORMAT}', and it is {version}; start tokenyard prepare again"
        )
    if about.get("hash") != manifest_hash(about):
        raise ValueError(f"{path} is damaged: its hash is another; start tokenyard prepare again, which keeps what is whole")
    return about


def manifest_hash(about: dict[str, Any]) -> str:
    """Returns xxh3-128 of a manifest without its hash."""
    rest = {name: value for name, value in about.items() if name != "hash"}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())


def verify(folder: Path) -> Iterator[tuple[ShardRecord, str]]:
    """Yields each shard of the manifest with what is wrong with it ("" for nothing), after reading all of its bytes.

    Raises ValueError, one line, if the manifest is missing or damaged.
    """
    about = read_manifest(folder)
    for record in (ShardRecord(**record) for split in about["splits"].values() for record in split):
        try:
            _check_hash(folder, record, _open(folder, record))
            yield record, ""
        except ValueError as error:
            yield record, str(error)


def tokenizer_overrides(folder: Path) -> str:
    """Returns the overrides for the tokenizer in the folder of the shards. Raises ValueError if it is damaged."""
    settings = settings_of_saved(folder / TOKENIZER_FOLDER)
    return " ".join(f"tokenizer.{key}={value or repr(value)}" for key, value in settings.items() if value is not None)


@final
class ConcatenatedArrays:
    """Several memory-mapped arrays as one, indexed by integer arrays or slices like a numpy array."""

    def __init__(
        self, lengths: list[int], opened: Callable[[int], np.ndarray], check: Callable[[int, np.ndarray], None] | None = None
    ) -> None:
        """opened: returns an array by its index; called once. check: called with index and array before it is first read."""
        self._opened, self._check = opened, check
        self._arrays: dict[int, np.ndarray] = {}
        self._checked = set[int]()
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, places: np.ndarray | slice) -> np.ndarray:
        if isinstance(places, slice):
            return self._slice(*places.indices(len(self)))
        which = np.searchsorted(self._starts, places, side="right") - 1
        parts = {int(index): self._read(int(index)) for index in np.unique(which)}
        found = np.empty(places.shape, dtype=next(iter(parts.values())).dtype if parts else np.uint16)
        for index, array in parts.items():
            inside = which == index
            found[inside] = array[places[inside] - self._starts[index]]
        return found

    def open_all(self) -> None:
        """Opens every array that is not."""
        for index in range(len(self._starts) - 1):
            self._open(index)

    def _slice(self, start: int, stop: int, step: int) -> np.ndarray:
        assert step == 1, "only consecutive items"
        if start >= stop:
            return self[np.empty(0, dtype=np.int64)]
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        begins = [max(0, start - int(self._starts[index])) for index in range(first, last + 1)]
        ends = [stop - int(self._starts[index]) for index in range(first, last + 1)]
        return np.concatenate([self._read(first + at)[begin:end] for at, (begin, end) in enumerate(zip(begins, ends, strict=True))])

    def _read(self, index: int) -> np.ndarray:
        array = self._open(index)
        if self._check and index not in self._checked:
            self._check(index, array)
            self._checked.add(index)
        return array

    def _open(self, index: int) -> np.ndarray:
        if index not in self._arrays:
            self._arrays[index] = self._opened(index)
        return self._arrays[index]


def _open(folder: Path, record: ShardRecord) -> np.ndarray:
    path = folder / record.file
    if path.parent != folder:
        raise ValueError(f"{folder / MANIFEST_FILE} names a file outside of its folder: {record.file}")
    try:
        if not S_ISREG(path.lstat().st_mode):
            raise ValueError("it is no regular file")
        size = path.stat().st_size
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); {AGAIN}") from None
    if ids.shape != (record.tokens,) or size != getattr(ids, "offset", 0) + ids.nbytes:
        raise ValueError(f"{path} is damaged: {size:,} bytes, {ids.shape} for {record.tokens} ids; {AGAIN}")
    return ids


def _check_hash(folder: Path, record: ShardRecord, ids: np.ndarray) -> None:
    if (found := hash_ids(ids)) != record.hash:
        raise ValueError(f"{folder / record.file} is damaged: its ids have hash {found}, not {record.hash}; {AGAIN}")
