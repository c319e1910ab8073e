"""`tokenyard prepare`: tokenizes a source into shards, in several processes; started again, it keeps what is finished."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash

from .cache import cache_folder
from .checks import check_corpus
from .config import STREAMED, Corpus, DataConfig, MixtureSource, TokenizerConfig
from .errors import BadData
from .pretokenized import FORMAT, MANIFEST_FILE, TOKENIZER_FOLDER, VERSION, ShardRecord, manifest_hash
from .stream.http import RetryPolicy
from .stream.hub_shards import open_shards
from .stream.shards import FailedShard, Row, Shards
from .stream.tokenize import Tokenization, Window, is_held_out, tokenize_share
from .token_array import TokenArray, id_type, write_header
from .tokenizer import load_tokenizer
from .tokenizer_types import Tokenizer

LEAST_JOBS = 8
BLOCK = 256


class PretokenizeJob(NamedTuple):
    """Part `part` of the `parts` of a shard: every `parts`-th block of 256 rows."""

    folder: str
    config: DataConfig
    shard: int
    part: int
    parts: int
    key: str
    """Hash of the data, the tokenizer and the settings."""

    @property
    def name(self) -> str:
        return f"{self.shard:05}_{self.part:02}"


def pretokenize_stream(
    config: DataConfig, tokenizer: Tokenizer, folder: Path, processes: int, progress: Callable[[int, int, int], None]
) -> dict[str, Any]:
    """Fills `folder` from a streamed source and returns its manifest. `progress(done, total, tokens)` is called after each shard.

    Neither the number of processes nor interruptions change a byte. Raises ValueError, one line, if the folder has other data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    retry = RetryPolicy(config.patience_seconds, config.stall_seconds)
    shards = open_shards(config, retry)
    kept = (shards.fingerprint, tokenizer.hash, config.validation_fraction, config.longest_row)
    key = xxhash.xxh3_128_hexdigest(repr(kept).encode())
    for path in (*folder.glob("part_*.json"), *folder.glob(MANIFEST_FILE)):
        if json.loads(path.read_text()).get("key") != key:
            raise ValueError(f"{folder} holds shards of other data, another tokenizer or other settings; name a new folder")
    tokenizer.save(folder / TOKENIZER_FOLDER)
    parts = max(1, -(-LEAST_JOBS // len(shards.names)))
    jobs = [
        PretokenizeJob(str(folder), config, shard, part, parts, key) for shard in range(len(shards.names)) for part in range(parts)
    ]
    done = {job.name: record for job in jobs if (record := _finished(job)) is not None}
    waiting = [job for job in jobs if job.name not in done]
    tokens = sum(record["train"]["tokens"] for record in done.values())
    progress(len(done), len(jobs), tokens)
    for name, record in _run_jobs(waiting, processes):
        done[name] = record
        tokens += record["train"]["tokens"]
        progress(len(done), len(jobs), tokens)
    splits = {
        split: [done[job.name][split] for job in jobs if done[job.name][split]["tokens"]] for split in ("train", "validation")
    }
    return finish(folder, tokenizer, splits, key)


def write_arrays(tokenizer: Tokenizer, folder: Path, splits: dict[str, TokenArray]) -> dict[str, Any]:
    """Like `pretokenize_stream`, for a source that is tokenized already: one shard for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / TOKENIZER_FOLDER)
    records = {}
    for split, tokens in splits.items():
        about = tokens.manifest
        ids = np.asarray(tokens.ids)
        np.save(folder / f"{split}_00000_00.npy", ids, allow_pickle=False)
        digest = xxhash.xxh3_128_hexdigest(ids.tobytes())
        records[split] = [ShardRecord(f"{split}_00000_00.npy", len(ids), about.documents, about.bytes, digest, [])._asdict()]
    return finish(folder, tokenizer, records, "")


def finish(folder: Path, tokenizer: Tokenizer, splits: dict[str, list[dict[str, Any]]], key: str) -> dict[str, Any]:
    """Writes the manifest, which makes the folder complete."""
    for split, records in splits.items():
        if not records:
            raise ValueError(f"the data has no {split} document; change data.validation_fraction")
    about = {"format": FORMAT, "version": VERSION, "key": key, "tokenizer_hash": tokenizer.hash, "splits": splits}
    about["hash"] = manifest_hash(about)
    _write_whole(folder / MANIFEST_FILE, json.dumps(about, indent=1) + "\n")
    return about


def _run_jobs(jobs: list[PretokenizeJob], processes: int) -> Any:
    if processes <= 1:
        yield from ((job.name, run_job(job)) for job in jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        started = {pool.submit(run_job, job): job for job in jobs}
        for future in as_completed(started):
            yield started[future].name, future.result()


def run_job(job: PretokenizeJob) -> dict[str, Any]:
    """Runs in a worker process: tokenizes one part and returns its records, by split."""
    shards = open_shards(job.config, RetryPolicy(job.config.patience_seconds, job.config.stall_seconds))
    tokenizer = load_tokenizer(Path(job.folder) / TOKENIZER_FOLDER)
    with ExitStack() as stack:
        names = {split: f"{split}_{job.name}.npy" for split in ("train", "validation")}
        writers = {split: stack.enter_context(closing(ShardWriter(Path(job.folder), names[split], tokenizer))) for split in names}
        for window in _blocks(shards, job):
            for split, rows in _split(window, job.config.validation_fraction).items():
                writers[split].write(tokenize_share(rows, 0, (0, 1), Tokenization(tokenizer, 0.0, job.config.longest_row), shards))
        record = {split: writer.finish()._asdict() for split, writer in writers.items()}
    _write_whole(Path(job.folder) / f"part_{job.name}.json", json.dumps({"key": job.key, **record}) + "\n")
    return record


class ShardWriter:
    """Appends to an .npy file."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer) -> None:
        self._path, self._kind = folder / name, id_type(tokenizer)
        self._file: BinaryIO = self._path.with_suffix(".unfinished").open("wb")
        self._hash = xxhash.xxh3_128()
        self._tokens = self._documents = self._bytes = 0
        self._bad: list[str] = []
        write_header(self._file, self._kind, 0)

    def write(self, piece: Any) -> None:
        """Appends the documents of a TokenizedShare."""
        ids = piece.tokens.astype(self._kind).tobytes()
        self._file.write(ids)
        self._hash.update(ids)
        self._tokens += len(piece.tokens)
        self._documents += len(piece.lengths) - len(piece.bad)
        self._bytes += piece.bytes
        self._bad += [f"{name} row {row}: {reason}" for name, row, reason in sorted(piece.bad)]

    def finish(self) -> ShardRecord:
        """Completes the header and gives the file its final name."""
        self._file.seek(0)
        write_header(self._file, self._kind, self._tokens)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        self._path.with_suffix(".unfinished").rename(self._path)
        return ShardRecord(self._path.name, self._tokens, self._documents, self._bytes, self._hash.hexdigest(), self._bad)

    def close(self) -> None:
        """Closes the file; without `finish` it keeps its temporary name."""
        self._file.close()


def _blocks(shards: Shards, job: PretokenizeJob) -> Any:
    numbers: list[int] = []
    rows: list[Row] = []
    for number, row in enumerate(shards.rows(job.shard, 0)):
        if isinstance(row, FailedShard):
            raise BadData(f"{shards.names[job.shard]} failed after {number} rows: {row.reason}; mend it or leave it out")
        if number // BLOCK % job.parts == job.part:
            numbers.append(number)
            rows.append(row)
        if len(rows) == BLOCK:
            yield Window(job.shard, numbers, rows, None)
            numbers, rows = [], []
    yield Window(job.shard, numbers, rows, None)


def _split(window: Window, fraction: float) -> dict[str, Window]:
    """Returns the rows of each split, by the same hash as in streams."""
    held = [isinstance(row, bytes) and is_held_out(row, fraction) for row in window.rows]
    return {
        split: window._replace(
            numbers=[number for number, out in zip(window.numbers, held, strict=True) if out is chosen],
            rows=[row for row, out in zip(window.rows, held, strict=True) if out is chosen],
        )
        for split, chosen in (("train", False), ("validation", True))
    }


def _finished(job: PretokenizeJob) -> dict[str, Any] | None:
    try:
        record = json.loads((Path(job.folder) / f"part_{job.name}.json").read_text())
    except (OSError, ValueError):
        return None
    there = all((Path(job.folder) / record[split]["file"]).is_file() for split in ("train", "validation"))
    return {split: record[split] for split in ("train", "validation")} if record["key"] == job.key and there else None


def _write_whole(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.rename(path)


def prepare_shards(
    config: DataConfig, tokenizer_config: TokenizerConfig, folder: Path, processes: int, progress: Callable[[int, int, int], None]
) -> dict[str, Any]:
    """Writes the shards of `tokenyard prepare`. Returns the manifest. Raises ValueError, one line, for what cannot be prepared."""
    from .build import open_tokenizer
    from .stream.source import open_array

    check_corpus(config)
    if config.corpus in (Corpus.mix, Corpus.prepared):
        raise ValueError(f"data.corpus={config.corpus.value} cannot be prepared; prepare each source, and mix the results")
    cache = cache_folder(config)
    tokenizer = open_tokenizer(config, tokenizer_config, cache)
    if config.corpus in STREAMED:
        return pretokenize_stream(config, tokenizer, folder, processes, progress)
    part = MixtureSource("", 1.0, config)
    return write_arrays(
        tokenizer, folder, {split: open_array(part.config, split, tokenizer, cache) for split in ("train", "validation")}
    )
