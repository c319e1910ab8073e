"""Files whose rows say which they are, and streams of them on made-up ranks."""

import gzip
import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenyard.data.build import open_data
from tokenyard.data.config import Corpus, DataConfig, TokenizerConfig, TokenizerKind
from tokenyard.data.stream.documents import TokenizingRanks
from tokenyard.data.stream.mixture import StreamBatches
from tokenyard.data.tokenizer_types import BytesTokenizer

BYTES = TokenizerConfig(kind=TokenizerKind.bytes)
LENGTH = 32
OPENING = threading.Lock()
"""Ranks are threads here, and in CPython 3.11 ast.literal_eval, by which numpy reads headers, is not safe in several at once."""
ROWS = [37, 64, 5, 90, 1, 48]


def document(shard: int, row: int) -> str:
    return f"<{shard}.{row}>" + "ab" * (row * 7 % 23)


def all_documents(shards: int = len(ROWS)) -> list[str]:
    return [f"<{shard}.{row}>" for shard in range(shards) for row in range(ROWS[shard])]


def write(folder: Path, kind: Corpus) -> DataConfig:
    """Six shards of uneven sizes."""
    folder.mkdir(parents=True)
    for shard, rows in enumerate(ROWS):
        texts = [document(shard, row) for row in range(rows)]
        if kind is Corpus.parquet:
            pq.write_table(pa.table({"n": range(rows), "text": texts}), folder / f"{shard}.parquet", row_group_size=16)
        elif kind is Corpus.jsonl:
            with gzip.open(folder / f"{shard}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps({"text": text, "n": 1}) + "\n" for text in texts)
        else:
            (folder / f"{shard}.txt").write_text("\n".join(texts))
    return config_of(folder, kind)


def config_of(folder: Path, kind: Corpus, **more: object) -> DataConfig:
    """Almost nothing is held out, so that all rows can be counted."""
    cache = str(folder.parent / "cache")
    config = DataConfig(corpus=kind, path=str(folder), cache=cache, window=8, open_shards=3, workers=0, validation_fraction=0.02)
    return replace(config, **more)


def opened(config: DataConfig, world: TokenizingRanks | None = None, sequences: int = 4, seed: int = 1) -> StreamBatches:
    with OPENING:
        batches = open_data(config, BYTES, LENGTH, seed, sequences, world, 1).train
    assert isinstance(batches, StreamBatches)
    return batches


def taken(batches: StreamBatches, steps: range) -> np.ndarray:
    """The ids of the global batches, (steps, B, S)."""
    return np.stack([batches.batch(step).ids_BS.numpy() for step in steps])


def names_in(ids: np.ndarray) -> list[str]:
    """Which documents begin in these ids, in order."""
    return re.findall(r"<\d+\.\d+>", BytesTokenizer().decode(ids.reshape(-1).tolist()))


def on_ranks(world: int, work: Callable[[TokenizingRanks], np.ndarray], of: TokenizingRanks | None = None) -> list[np.ndarray]:
    """`work` on threads that exchange with each other as ranks do. `of`: which rows each takes; by default all ranks take all."""
    barrier, slots = threading.Barrier(world), list[Any]([None] * world)

    def gather(rank: int, value: Any) -> list[Any]:
        slots[rank] = value
        barrier.wait(30)
        gathered = list(slots)
        barrier.wait(30)
        return gathered

    def one(rank: int) -> np.ndarray:
        def exchange(tokens: np.ndarray, to: list[int], received: list[int]) -> np.ndarray:
            assert len(tokens) == sum(to) and tokens.dtype == np.int32
            ends = np.cumsum(to)
            parts = [each[rank] for each in gather(rank, np.split(tokens, ends[:-1]))]
            assert [len(part) for part in parts] == received
            return np.concatenate(parts)

        ranks = (of or TokenizingRanks(takers=np.arange(world)[None]))._replace(
            rank=rank,
            size=world,
            add=lambda table: np.sum(gather(rank, table), axis=0),
            exchange=exchange,
            gather=lambda data: gather(rank, data),
        )
        return work(ranks)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))
