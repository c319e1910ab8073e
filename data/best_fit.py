"""Best-fit packing of documents into rows (Ding et al. 2024): only documents that are longer than a row are cut.

S tokens of a sequence. A row has S + 1 tokens, of which the first S are inputs and the last S targets, as in data/batches.py.
Cut documents fill whole rows, of which each begins with the last token of the one before, so that every token but the first of a
document is a target once an epoch. What is left of them, and all shorter documents, are packed by best-fit decreasing.
"""

import logging
from typing import final

import numpy as np
import xxhash

from .token_array import TokenArray

AT_ONCE = 1 << 24
"""Tokens that are searched for ends of documents at once."""
log = logging.getLogger("tokenyard")


@final
class PackedRows:
    """The rows of a tokenized corpus. They depend on its tokens and on S alone."""

    def __init__(self, tokens: TokenArray, sequence_length: int, end: int) -> None:
        """`end`: the id of the token that ends a document. Raises ValueError, one line, if no document has a target."""
        self._ids, self._width, self._end = tokens.ids, sequence_length + 1, end
        self.fingerprint = xxhash.xxh3_128_hexdigest(f"best fit {tokens.manifest.fingerprint}".encode())
        parts = range(0, len(tokens.ids), AT_ONCE)
        found = [np.flatnonzero(np.asarray(tokens.ids[start : start + AT_ONCE]) == end) + start for start in parts]
        ends = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
        starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
        lengths = ends - starts + 1
        whole = np.maximum(lengths - 1, 0) // sequence_length
        index = np.arange(whole.sum()) - np.repeat(whole.cumsum() - whole, whole)
        rests = lengths - whole * sequence_length
        packed = np.flatnonzero(rests >= 2)
        packed = packed[np.argsort(-rests[packed], kind="stable")]
        rows = len(index) + np.array(best_fit(rests[packed].tolist(), self._width), dtype=np.int64)
        order = np.argsort(rows, kind="stable")
        pieces = packed[order]
        self._starts = np.concatenate([np.repeat(starts, whole) + index * sequence_length, (starts + lengths - rests)[pieces]])
        self._lengths = np.concatenate([np.full(len(index), self._width), rests[pieces]])
        _, firsts = np.unique(np.concatenate([np.arange(len(index)), rows[order]]), return_index=True)
        self._bounds, self.rows = np.append(firsts, len(self._starts)), len(firsts)
        if not self.rows:
            raise ValueError("data.packing=best_fit: no training document has two tokens")
        self.padding = 1 - float(self._lengths.sum()) / (self.rows * self._width)
        """The share of the tokens of all rows that are padding."""
        cut = int((lengths > self._width).sum())
        words = "data: best fit: %d rows of %d tokens, %.2f%% of them padding; %d of %d documents are longer than a row and cut"
        log.info(words, self.rows, sequence_length, 100 * self.padding, cut, len(ends))

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns rows of shape (indices, S + 1), int64, padded with the token that ends documents."""
        rows = np.full((len(indices), self._width), self._end, dtype=np.int64)
        for row, index in zip(rows, indices.tolist(), strict=True):
            at = 0
            for piece in range(self._bounds[index], self._bounds[index + 1]):
                start, length = int(self._starts[piece]), int(self._lengths[piece])
                row[at : at + length] = self._ids[start : start + length]
                at += length
        return rows


def best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Returns the row of each piece: the fullest row that it fits into, or a new one. `lengths` decrease, none exceeds `capacity`.

    `rooms` has a bit for each number of tokens that is left in some row, so the smallest that suffices is found without a search.
    """
    of_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, rows, found = 0, 0, []
    for length in lengths:
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = of_room[room].pop()
            rooms ^= 0 if of_room[room] else 1 << room
        else:
            room, row, rows = capacity, rows, rows + 1
        of_room[room - length].append(row)
        rooms |= 1 << (room - length)
        found.append(row)
    return found
