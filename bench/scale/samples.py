"""What the data cost a rank as the world grows: what it receives and sends of streamed rows, and the order of a trillion tokens.

Each rank trains on one sequence of SEQUENCE tokens a step. Documents have lengths as on the web (log-normal, 1,000 tokens in the
mean). The messages are those of data/stream, with exchanges that count instead of communicating. `before` is an all-gather of all
tokens of a round to every rank, padded to the most of any rank, and a sorted permutation of all rows.

    python -m tokenyard.bench.scale.samples 2048
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from ...data.config import DataConfig
from ...data.permutation import permuted
from ...data.stream.documents import DocumentBuffer, TokenizingRanks
from ...data.stream.window_facts import HEAD

SEQUENCE, MEAN_DOCUMENT, SIGMA = 4096, 1000, 1.2
CORPUS_ROWS = 10**12 // SEQUENCE
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
        "memory of this process MB": int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6,
    }


def round_of_documents(world: int) -> np.ndarray:
    """Returns the tokens of each document of a round: a window of every open shard."""
    draw = np.random.default_rng(world).lognormal(np.log(MEAN_DOCUMENT) - SIGMA**2 / 2, SIGMA, SLOTS * WINDOW)
    return np.maximum(2, draw).astype(np.int64)


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
