"""A split of a corpus as one flat array of token ids, tokenized once and then memory-mapped from the cache."""

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash

from .cache import atomic_folder
from .corpus import CorpusSurvey, Document, Split, unit_hash
from .tokenizer_types import Tokenizer

TOKENS_FILE = "tokens.npy"
MANIFEST_FILE = "manifest.json"
STAMP_FILE = "seen.json"
"""A stamp that shows without reading all tokens whether they are those that were written."""
SAMPLES, SAMPLE_BYTES = 16, 1 << 16
"""Number and bytes of the samples of a file that its stamp hashes; up to 1 MiB they cover all of it."""
HASHED = 1 << 24
"""Ids hashed at a time."""
BATCH_CHARACTERS = 4_000_000
"""Characters tokenized at a time."""
log = logging.getLogger("tokenyard")


class TokensManifest(NamedTuple):
    documents: int
    tokens: int
    bytes: int
    """UTF-8 bytes of the documents."""
    undecodable: list[str]
    """Names of documents of the whole corpus that are not UTF-8."""
    duplicates: int
    empty: int
    fingerprint: str
    """xxh3-128 over the token ids."""


class ShardRecord(NamedTuple):
    """One .npy file of pretokenized ids, uint16 or uint32."""

    file: str
    tokens: int
    documents: int
    bytes: int
    """UTF-8 bytes of its documents."""
    hash: str
    """xxh3-128 of the ids."""
    bad: list[str]
    """Rows that were skipped: shard, row and reason of each."""


class TokensPlace(NamedTuple):
    """Where tokens are, with all that another process needs to open them without reading it again."""

    path: str
    """A file of tokens, or a folder of pretokenized shards."""
    manifest: TokensManifest
    shards: list[ShardRecord] | None = None


class TokenArray(NamedTuple):
    ids: np.ndarray
    """Shape (tokens,), uint16 or uint32, read-only: documents in the order of a hash of their names, each with its end token."""
    manifest: TokensManifest
    place: TokensPlace | None = None
    """None if they are in memory alone."""


def open_tokens(corpus: CorpusSurvey, split: Split, tokenizer: Tokenizer, cache: Path, verify: bool = False) -> TokenArray:
    """Returns the tokens of one split, made now if `cache` does not have them. `verify` hashes all of them."""
    key = xxhash.xxh3_128_hexdigest(f"tokens 1 {split} {corpus.fingerprints[split]} {tokenizer.hash}".encode())
    folder = cache / "tokens" / key
    if not folder.is_dir():
        started = time.perf_counter()
        with atomic_folder(folder) as unfinished:
            manifest = _write(corpus, split, tokenizer, unfinished)
        seconds = time.perf_counter() - started
        log.info("data: %s: %d tokens of %d documents in %.1f s", split, manifest.tokens, manifest.documents, seconds)
    return load_tokens(folder, verify)


def load_tokens(folder: Path, verify: bool = False) -> TokenArray:
    """Returns the tokens in a folder of the cache. Raises ValueError, one line, if they are damaged or were changed.

    Hashes all of them with `verify`, or if the stamp (size, time and a hash of 16 samples) differs.
    """
    try:
        manifest = TokensManifest(**json.loads((folder / MANIFEST_FILE).read_text()))
        ids = np.load(folder / TOKENS_FILE, mmap_mode="r", allow_pickle=False)
        whole = verify or not _stamp_matches(folder)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"cached tokens in {folder} are damaged ({error}); remove the folder and they are made again") from None
    if ids.shape != (manifest.tokens,):
        raise ValueError(f"cached tokens in {folder} are damaged ({ids.shape} for {manifest.tokens}); remove the folder")
    if whole and (found := hash_ids(ids)) != manifest.fingerprint:
        raise ValueError(
            f"cached tokens in {folder} were changed (hash {found}, not {manifest.fingerprint}); "
            "remove the folder and they are made again"
        )
    return TokenArray(ids, manifest, TokensPlace(str(folder / TOKENS_FILE), manifest))


def map_tokens(place: TokensPlace) -> TokenArray:
    """Returns tokens that another process has loaded. Raises ValueError, one line, if the file has another number of them."""
    file, manifest = Path(place.path), place.manifest
    try:
        ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"cached tokens in {file.parent} are damaged ({error}); remove the folder") from None
    if ids.shape != (manifest.tokens,):
        raise ValueError(f"cached tokens in {file.parent} are damaged ({ids.shape} for {manifest.tokens}); remove the folder")
    return TokenArray(ids, manifest, place)


def hash_ids(ids: np.ndarray) -> str:
    """Returns xxh3-128 of an array on disk."""
    running = xxhash.xxh3_128()
    for start in range(0, len(ids), HASHED):
        running.update(np.ascontiguousarray(ids[start : start + HASHED]).data)
    return running.hexdigest()


def write_stamp(folder: Path) -> None:
    """Stamps the tokens that were just written into `folder`."""
    (folder / STAMP_FILE).write_text(json.dumps(_stamp(folder / TOKENS_FILE)) + "\n")


def _stamp_matches(folder: Path) -> bool:
    """Whether the tokens have the stamp of the folder; False for a folder without one."""
    try:
        return json.loads((folder / STAMP_FILE).read_text()) == _stamp(folder / TOKENS_FILE)
    except FileNotFoundError:
        return False


def _stamp(path: Path) -> dict[str, Any]:
    """Returns size, time and a hash of samples that are spread over the file."""
    about, running = path.stat(), xxhash.xxh3_128()
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(max(0, about.st_size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            running.update(file.read(SAMPLE_BYTES))
    return {"bytes": about.st_size, "time": about.st_mtime_ns, "pieces": running.hexdigest()}


def _write(corpus: CorpusSurvey, split: Split, tokenizer: Tokenizer, folder: Path) -> TokensManifest:
    names = sorted(corpus.names(split), key=lambda name: (unit_hash(name, seed=2), name))
    kind = id_type(tokenizer)
    running, tokens, size = xxhash.xxh3_128(), 0, 0
    with (folder / TOKENS_FILE).open("wb") as file:
        write_header(file, kind, 0)
        for texts in _batches(map(corpus.read, names)):
            encoded = tokenizer.encode_documents(texts, threads=min(os.cpu_count() or 1, 16))
            ids = np.concatenate([np.array(each, dtype=kind) for each in encoded])
            file.write(ids.tobytes())
            running.update(ids.tobytes())
            tokens += len(ids)
            size += sum(len(text.encode()) for text in texts)
        file.seek(0)
        write_header(file, kind, tokens)
    skipped = corpus.undecodable, corpus.duplicates, corpus.empty
    manifest = TokensManifest(len(names), tokens, size, *skipped, running.hexdigest())
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest._asdict(), indent=1) + "\n")
    write_stamp(folder)
    return manifest


def id_type(tokenizer: Tokenizer) -> np.dtype:
    """Returns the smallest type that holds every id."""
    return np.dtype("<u2" if tokenizer.size <= 2**16 else "<u4")


def write_header(file: BinaryIO, kind: np.dtype, tokens: int) -> None:
    """Writes the header of an .npy file of `tokens` ids."""
    # numpy pads the header, so that the number of tokens can be filled in at the end.
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(file, header)


def _batches(documents: Iterator[Document]) -> Iterator[list[str]]:
    """Texts in batches of at least BATCH_CHARACTERS: enough for all threads, and little in memory."""
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts
