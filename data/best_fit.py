"""Best-fit packing of documents into rows (Ding et al. 2024): only documents that are longer than a row are cut.

S tokens of a sequence. A row has S + 1 tokens, of which the first S are inputs and the last S targets, as in data/batches.py.
Cut documents fill whole rows, of which each begins with the last token of the one before, so that every token but the first of a
document is a target once an epoch. What is left of them, and all shorter documents, are packed by best-fit decreasing. One process
makes the table of all pieces, all map it into memory.
"""

import logging
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import xxhash

from .cache import atomic_folder
from .token_array import TokenArray

AT_ONCE = 1 << 24
"""Tokens that are searched for ends of documents at once."""
log = logging.getLogger("tokenyard")


class PackedTable(NamedTuple):
    """The pieces of documents that make up rows, in the order of rows."""

    starts: np.ndarray
    """int64: the first token of each piece."""
    lengths: np.ndarray
    """int32: its tokens."""
    bounds: np.ndarray
    """int64: row r has the pieces from bounds[r] to bounds[r + 1]."""
    numbers: np.ndarray
    """int64: tokens in all pieces, documents that are cut, documents."""


@final
class PackedRows:
    """The rows of a tokenized corpus. They depend on its tokens and on S alone."""

    def __init__(self, tokens: TokenArray, sequence_length: int, end: int, cache: Path | None = None) -> None:
        """`end`: the id of the token that ends a document. `cache`: where the table of rows is, or is written now.

        Raises ValueError, one line, if no document has a target.
        """
        self._ids, self._width, self._end = tokens.ids, sequence_length + 1, end
        self.fingerprint = xxhash.xxh3_128_hexdigest(f"best fit {tokens.manifest.fingerprint}".encode())
        self._table = _table(self.fingerprint, tokens.ids, sequence_length, end, cache)
        self.rows = len(self._table.bounds) - 1
        if not self.rows:
            raise ValueError("data.packing=best_fit: no training document has two tokens")
        held, cut, documents = self._table.numbers.tolist()
        self.padding = 1 - held / (self.rows * self._width)
        """The share of the tokens of all rows that are padding."""
        words = "data: best fit: %d rows of %d tokens, %.2f%% of them padding; %d of %d documents are longer than a row and cut"
        log.info(words, self.rows, sequence_length, 100 * self.padding, cut, documents)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns rows of shape (indices, S + 1), int64, padded with the token that ends documents."""
        rows = np.full((len(indices), self._width), self._end, dtype=np.int64)
        for row, index in zip(rows, indices.tolist(), strict=True):
            at = 0
            for piece in range(self._table.bounds[index], self._table.bounds[index + 1]):
                start, length = int(self._table.starts[piece]), int(self._table.lengths[piece])
                row[at : at + length] = self._ids[start : start + length]
                at += length
        return rows


def _table(fingerprint: str, ids: np.ndarray, sequence_length: int, end: int, cache: Path | None) -> PackedTable:
    if cache is None:
        return pack(ids, sequence_length, end)
    folder = cache / "packed" / xxhash.xxh3_128_hexdigest(f"1 {fingerprint} {sequence_length} {end}".encode())
    if not folder.is_dir():
        with atomic_folder(folder) as unfinished:
            for name, array in pack(ids, sequence_length, end)._asdict().items():
                np.save(unfinished / f"{name}.npy", array, allow_pickle=False)
    try:
        return PackedTable(*(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in PackedTable._fields))
    except (OSError, ValueError) as error:
        raise ValueError(f"packed rows in {folder} are damaged ({error}); remove the folder and they are made again") from None


def pack(ids: np.ndarray, sequence_length: int, end: int) -> PackedTable:
    """Returns the rows of the documents in `ids`, each of which ends with `end`."""
    width = sequence_length + 1
    parts = range(0, len(ids), AT_ONCE)
    found = [np.flatnonzero(np.asarray(ids[start : start + AT_ONCE]) == end) + start for start in parts]
    ends = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    lengths = ends - starts + 1
    whole = np.maximum(lengths - 1, 0) // sequence_length
    index = np.arange(whole.sum()) - np.repeat(whole.cumsum() - whole, whole)
    rests = lengths - whole * sequence_length
    packed = np.flatnonzero(rests >= 2)
    packed = packed[np.argsort(-rests[packed], kind="stable")]
    rows = len(index) + best_fit(rests[packed], width)
    order = np.argsort(rows, kind="stable")
    pieces = packed[order]
    piece_starts = np.concatenate([np.repeat(starts, whole) + index * sequence_length, (starts + lengths - rests)[pieces]])
    piece_lengths = np.concatenate([np.full(len(index), width), rests[pieces]]).astype(np.int32)
    _, firsts = np.unique(np.concatenate([np.arange(len(index)), rows[order]]), return_index=True)
    bounds = np.append(firsts, len(piece_starts)).astype(np.int64)
    cut = int((lengths > width).sum())
    return PackedTable(piece_starts, piece_lengths, bounds, np.array([piece_lengths.sum(dtype=np.int64), cut, len(ends)]))


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the row of each piece: the fullest row that it fits into, or a new one. `lengths` decrease, none exceeds `capacity`.

    Pieces of one length go together: the smallest room that suffices, of rows with equal room the last one, takes as many as fit,
    because what they leave is the smallest room until it no longer suffices.
    """
    of_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
    rooms, rows, found = 0, 0, [np.empty(0, dtype=np.int64)]
    sizes, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(sizes.tolist()[::-1], counts.tolist()[::-1], strict=True):
        left = count
        while left:
            fitting = rooms >> length  # a bit for each number of tokens that is left in some row
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = room // length
            if fitting:
                stack = of_room[room].pop()
                taken = stack[::-1][: -(-left // each)]
                if len(rest := stack[: len(stack) - len(taken)]):
                    of_room[room].append(rest)
                rooms ^= 0 if of_room[room] else 1 << room
            else:
                taken = np.arange(rows, rows + -(-left // each))
                rows += len(taken)
            placed = min(left, len(taken) * each)
            found.append(np.repeat(taken, each)[:placed])
            left -= placed
            full = placed // each
            for rows_of_room, space in ((taken[:full], room - each * length), (taken[full:], room - placed % each * length)):
                if len(rows_of_room):
                    of_room[space].append(rows_of_room)
                    rooms |= 1 << space
    return np.concatenate(found)
