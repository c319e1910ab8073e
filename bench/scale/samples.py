"""What the data cost a rank as the world grows: streamed rows that it receives and sends, the order and packing of 1T tokens.

Each rank trains on one sequence of SEQUENCE tokens a step. Documents have lengths as on the web (log-normal, 1,000 tokens in the
mean). The messages are those of data/stream, with exchanges that count instead of communicating. `before` is an all-gather of all
tokens of a round to every rank, padded to the most of any rank, a sorted permutation of all rows, and all documents packed at once.

    python -m tokenyard.bench.scale.samples 2048
"""

import itertools
import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...data.best_fit import pack, pack_documents
from ...data.config import DataConfig
from ...data.permutation import permuted
from ...data.stream.documents import DocumentBuffer, TokenizingRanks
from ...data.stream.window_facts import HEAD

SEQUENCE, MEAN_DOCUMENT, SIGMA = 4096, 1000, 1.2
CORPUS = 10**12
CORPUS_ROWS = CORPUS // SEQUENCE
COUNTED_RANKS = 16
WINDOW, SLOTS = DataConfig.window, DataConfig.open_shards


def figures(world: int) -> dict[str, float]:
    """Returns the figures of one step on `world` data ranks."""
    lengths, owners = round_of_documents(world), owners_of_round(world)
    rounds = -(-(world * SEQUENCE + 1) // int(lengths.sum()))
    longest = int(np.bincount(owners, weights=lengths, minlength=world).max())
    table = 8 * (SLOTS + 1) * (HEAD + WINDOW)
    sent = [messages(rank, world, lengths, owners, rounds) for rank in range(0, world, max(1, world // COUNTED_RANKS))]
    begin = time.perf_counter()
    permuted(np.arange(world), CORPUS_ROWS, "train", world)
    seconds = time.perf_counter() - begin
    return {
        "rounds a step": rounds,
        "received MB a step": max(received for _, received in sent) / 1e6,
        "sent MB a step, most": max(sent_ for sent_, _ in sent) / 1e6,
        "all-reduced MB a step": rounds * table / 1e6,
        "host reads a step": rounds + 1,
        "before: received MB a step": rounds * world * 4 * longest / 1e6,
        "before: host reads a step": rounds * 2 * world,
        "seconds to find a step's rows of 1T tokens": seconds,
        "before: MB of their order": 8 * CORPUS_ROWS / 1e6,
        **packing(),
        "memory of this process MB": int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6,
    }


def packing() -> dict[str, float]:
    """Returns what rank 0 holds and takes to pack the corpus by best fit, from two of its windows."""
    ids: Any = GeneratedIds()
    begin = time.process_time()
    windows = list(itertools.islice(pack(ids, SEQUENCE, ids.END), 2))
    share = sum(int(window.numbers[0]) for window in windows) / CORPUS
    seconds, documents = (time.process_time() - begin) / share, sum(int(window.numbers[2]) for window in windows) / share
    padding = 1 - sum(int(window.numbers[0]) for window in windows) / sum((len(w.bounds) - 1) * (SEQUENCE + 1) for w in windows)
    starts = np.arange(0, 10**9, MEAN_DOCUMENT)
    ends = np.append(starts[1:], 10**9) - 1
    at_once = peak_bytes(lambda: pack_documents(starts, ends, SEQUENCE)) / len(starts)
    return {
        "packing: MB of rank 0 for 1T tokens": peak_bytes(lambda: next(pack(ids, SEQUENCE, ids.END))) / 1e6,
        "packing: hours of rank 0 for 1T tokens": seconds / 3600,
        "packing: GB of the table of 1T tokens": sum(sum(a.nbytes for a in window) for window in windows) / share / 1e9,
        "packing: % of padding": 100 * padding,
        "before: packing: MB of rank 0 for 1T tokens": (at_once + 16) * documents / 1e6,
    }


class GeneratedIds:
    """Stands in for the tokens of the corpus, of which none exists: every document is as long as a draw for its place says."""

    END = 1

    def __len__(self) -> int:
        return CORPUS

    def __getitem__(self, part: slice) -> np.ndarray:
        ids = np.zeros(part.stop - part.start, dtype=np.uint32)
        draw = np.random.default_rng(part.start)
        ends = np.cumsum(document_lengths(draw, 2 * len(ids) // MEAN_DOCUMENT))
        ids[ends[ends < len(ids)]] = self.END
        return ids


def peak_bytes(work: Callable[[], Any]) -> int:
    """Returns the most bytes that `work` holds at once."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def round_of_documents(world: int) -> np.ndarray:
    """Returns the tokens of each document of a round: a window of every open shard."""
    return document_lengths(np.random.default_rng(world), SLOTS * WINDOW)


def document_lengths(draw: np.random.Generator, count: int) -> np.ndarray:
    return np.maximum(2, draw.lognormal(np.log(MEAN_DOCUMENT) - SIGMA**2 / 2, SIGMA, count)).astype(np.int64)


def owners_of_round(world: int) -> np.ndarray:
    """Returns the rank that tokenizes each document, as StreamRows deals them."""
    found = []
    for slot in range(SLOTS):
        owners = np.arange(slot % world, world, SLOTS if world > SLOTS else world)
        found.append(owners[np.arange(WINDOW) % len(owners)])
    return np.concatenate(found)


def messages(rank: int, world: int, lengths: np.ndarray, owners: np.ndarray, rounds: int) -> tuple[int, int]:
    """Returns the bytes of tokens that `rank` sends and receives for one global batch."""
    counted: list[int] = []

    def exchange(tokens: np.ndarray, to: list[int], received: list[int]) -> np.ndarray:
        counted.extend((4 * sum(to), 4 * sum(received)))
        return np.zeros(sum(received), dtype=np.int32)

    buffer = DocumentBuffer(TokenizingRanks(rank, world, np.arange(world)[:, None], exchange=exchange), 0)
    own = np.zeros(int(lengths[owners == rank].sum()), dtype=np.int32)
    for _ in range(rounds):
        buffer.append(lengths, owners, own)
    at_B = np.arange(world)
    buffer.rows(SEQUENCE * at_B, at_B, SEQUENCE + 1)
    return counted[0], counted[1]


def main() -> None:
    print(json.dumps({world: figures(int(world)) for world in sys.argv[1:] or ["2048"]}, indent=1))


if __name__ == "__main__":
    main()
