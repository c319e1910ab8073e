"""The documents of a streamed source that are not used up, each on the rank that tokenized it, and how their tokens become rows.

All ranks know where each document lies, so each can tell which tokens to send to whom and what it will receive: a batch costs one
exchange of tokens whose sizes are known beforehand, in which a rank receives its own rows and nothing else.

B rows; P pieces: what a row has of one document; G ranks with the same rows.
"""

from collections.abc import Callable
from typing import NamedTuple, final

import numpy as np


class TokenizingRanks(NamedTuple):
    """The ranks that share the tokenizing, which rows each of them takes, and their collectives."""

    rank: int = 0
    size: int = 1
    takers: np.ndarray = np.zeros((1, 1), dtype=np.int64)
    """(data ranks, G): the ranks that take the rows of each data rank."""
    micro: int = 1
    """Rows of a micro-batch: row r of a global batch is that of data rank r // micro, modulo their number."""
    add: Callable[[np.ndarray], np.ndarray] = lambda table: table
    """All-reduce of an int64 array by sums."""
    exchange: Callable[[np.ndarray, list[int], list[int]], np.ndarray] = lambda tokens, to, received: tokens
    """All-to-all of int32 tokens, in the order of ranks; how many go to each rank, and how many come from each."""
    gather: Callable[[bytes], list[bytes]] = lambda data: [data]
    """All-gather of bytes, in the order of ranks, for errors."""

    def data_rank(self, at_B: np.ndarray) -> np.ndarray:
        """Returns the data rank that takes each of the rows `at_B` of a global batch."""
        return at_B // self.micro % len(self.takers)

    def takes(self, at_B: np.ndarray) -> np.ndarray:
        """Returns whether this rank takes each of the rows `at_B` of a global batch."""
        return (self.takers == self.rank).any(axis=1)[self.data_rank(at_B)]


class Pieces(NamedTuple):
    """What rows have of documents, in the order of the rows; each field is of shape (P,)."""

    row: np.ndarray
    document: np.ndarray
    begin: np.ndarray
    """Position in the source of the first token."""
    length: np.ndarray


@final
class DocumentBuffer:
    """The documents from a position of the source on. Positions count the tokens of the source since the run began."""

    def __init__(self, ranks: TokenizingRanks, position: int) -> None:
        self._ranks = ranks
        self.end = position
        none = np.empty(0, dtype=np.int64)
        self._starts, self._ends, self._owners, self._places = none, none, none, none
        """Of each document: its first position, the one behind its last, the rank that has it, and where its tokens are there."""
        self._own = np.empty(0, dtype=np.int32)

    def append(self, lengths: np.ndarray, owners: np.ndarray, own: np.ndarray) -> None:
        """Appends documents with their `lengths` and `owners`; `own`: the tokens of those that this rank owns."""
        ends = self.end + np.cumsum(lengths)
        mine = np.where(owners == self._ranks.rank, lengths, 0)
        places = len(self._own) + np.cumsum(mine) - mine
        assert mine.sum() == len(own), "the tokens of other documents"
        new = (ends - lengths, ends, owners, places)
        old = (self._starts, self._ends, self._owners, self._places)
        self._starts, self._ends, self._owners, self._places = (np.concatenate(pair) for pair in zip(old, new, strict=True))
        self._own = np.concatenate([self._own, own])
        self.end += int(lengths.sum())

    def drop(self, position: int) -> None:
        """Drops the documents that end at or before `position`."""
        first = int(np.searchsorted(self._ends, position, "right"))
        place = int(self._places[first]) if first < len(self._places) else len(self._own)
        self._starts, self._ends, self._owners = self._starts[first:], self._ends[first:], self._owners[first:]
        self._places = self._places[first:] - place
        self._own = self._own[place:].copy()

    def rows(self, starts_B: np.ndarray, at_B: np.ndarray, width: int) -> np.ndarray:
        """Returns (rows, width), int32: of the rows `at_B` of a batch, which begin at `starts_B`, this rank's. Collective."""
        ranks, pieces = self._ranks, self._pieces(starts_B, width)
        data_rank_P, owner_P = ranks.data_rank(at_B)[pieces.row], self._owners[pieces.document]
        sent, to_rank = self._sent(pieces, np.flatnonzero(owner_P == ranks.rank), data_rank_P)
        takes_B = ranks.takes(at_B)
        wanted = np.flatnonzero(takes_B[pieces.row])
        wanted = wanted[np.argsort(owner_P[wanted], kind="stable")]
        tokens = ranks.exchange(sent, to_rank, _by_rank(owner_P[wanted], pieces.length[wanted], ranks.size))
        own_B = np.cumsum(takes_B) - 1
        rows, row_P = np.empty((int(takes_B.sum()), width), dtype=np.int32), pieces.row[wanted]
        rows.reshape(-1)[_spans(own_B[row_P] * width + pieces.begin[wanted] - starts_B[row_P], pieces.length[wanted])] = tokens
        return rows

    def _pieces(self, starts_B: np.ndarray, width: int) -> Pieces:
        first_B, last_B = (np.searchsorted(self._ends, starts_B + further, "right") for further in (0, width - 1))
        counts_B = last_B - first_B + 1
        row = np.repeat(np.arange(len(starts_B)), counts_B)
        document = _spans(first_B, counts_B)
        begin = np.maximum(starts_B[row], self._starts[document])
        return Pieces(row, document, begin, np.minimum(starts_B[row] + width, self._ends[document]) - begin)

    def _sent(self, pieces: Pieces, mine: np.ndarray, data_rank_P: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Returns the tokens of the pieces `mine`, in the order of the ranks that take them, and how many go to each rank."""
        takers = self._ranks.takers[data_rank_P[mine]]
        order = np.argsort(takers.ravel(), kind="stable")
        piece, taker = np.repeat(mine, takers.shape[1])[order], takers.ravel()[order]
        document, length = pieces.document[piece], pieces.length[piece]
        places = self._places[document] + pieces.begin[piece] - self._starts[document]
        return self._own[_spans(places, length)], _by_rank(taker, length, self._ranks.size)


def _spans(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns begin, begin + 1, ... of each span, one span after the other."""
    return np.repeat(begins - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def _by_rank(ranks: np.ndarray, lengths: np.ndarray, size: int) -> list[int]:
    return np.bincount(ranks, weights=lengths, minlength=size).astype(np.int64).tolist()
