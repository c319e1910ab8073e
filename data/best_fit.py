"""Best-fit packing of documents into rows (Ding et al. 2024): only documents that are longer than a row are cut.

S tokens of a sequence. A row has S + 1 tokens, of which the first S are inputs and the last S targets, as in data/batches.py.
Cut documents fill whole rows, of which each begins with the last token of the one before, so that every token but the first of a
document is a target once an epoch. What is left of them, and all shorter documents, are packed by best-fit decreasing, a window of
neighbouring documents at a time: memory does not grow with the corpus. One process makes the table of all pieces, all map it.
"""

import itertools
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import xxhash

from .cache import atomic_folder
from .token_array import TokenArray, write_header

AT_ONCE = 1 << 24
"""Tokens that are searched for ends of documents at once."""
WINDOW_ROWS = 1 << 14
"""Rows that the tokens of a window fill, about: 67M tokens of 4,096 a sequence. Fewer would leave more padding."""
TABLE_FILE = "rows.npy"
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
    """int64: tokens in all pieces, documents that are cut, documents; windows, unless they are one."""


@final
class PackedRows:
    """The rows of a tokenized corpus. They depend on its tokens and S alone, and on the version of a table that the cache has."""

    def __init__(self, tokens: TokenArray, sequence_length: int, end: int, cache: Path | None = None) -> None:
        """`end`: the id of the token that ends a document. `cache`: where the table of rows is, or is written now.

        Raises ValueError, one line, if no document has a target.
        """
        self._ids, self._width, self._end = tokens.ids, sequence_length + 1, end
        key = xxhash.xxh3_128_hexdigest(f"best fit {tokens.manifest.fingerprint}".encode())
        self._table = _table(key, tokens.ids, sequence_length, end, cache)
        self.rows = len(self._table.bounds) - 1
        if not self.rows:
            raise ValueError("data.packing=best_fit: no training document has two tokens")
        held, cut, documents, *windows = self._table.numbers.tolist()
        of_one = windows in ([], [1])  # a single window has the rows of version 1
        self.fingerprint = key if of_one else xxhash.xxh3_128_hexdigest(f"{key} in windows of {WINDOW_ROWS} rows".encode())
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


def _table(key: str, ids: np.ndarray, sequence_length: int, end: int, cache: Path | None) -> PackedTable:
    if cache is None:
        return _joined(list(pack(ids, sequence_length, end)))
    old, folder = (
        cache / "packed" / xxhash.xxh3_128_hexdigest(f"{version} {key} {sequence_length} {end}".encode()) for version in (1, 2)
    )
    if not old.is_dir() and not folder.is_dir():
        with atomic_folder(folder) as unfinished:
            write_table(pack(ids, sequence_length, end), unfinished)
    folder = old if old.is_dir() else folder
    try:
        return _map_version_1(folder) if folder == old else map_table(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"packed rows in {folder} are damaged ({error}); remove the folder and they are made again") from None


def write_table(windows: Iterable[PackedTable], folder: Path) -> None:
    """Writes the rows of all windows to one file in `folder`: int64 numbers, bounds, starts, and two lengths to a number.

    Its first six numbers are pieces, rows, tokens in pieces, documents that are cut, documents, and windows.
    """
    parts = [folder / name for name in ("bounds", "starts", "lengths")]
    pieces, rows, totals = 0, 0, np.zeros(4, dtype=np.int64)
    with parts[0].open("wb") as bounds, parts[1].open("wb") as starts, parts[2].open("wb") as lengths:
        for window in windows:
            (window.bounds[:-1] + pieces).tofile(bounds)
            window.starts.tofile(starts)
            window.lengths.tofile(lengths)
            pieces, rows, totals = pieces + len(window.starts), rows + len(window.bounds) - 1, totals + np.append(window.numbers, 1)
        np.array([pieces]).tofile(bounds)
        np.zeros(pieces % 2, dtype=np.int32).tofile(lengths)
    with (folder / TABLE_FILE).open("wb") as file:
        write_header(file, np.dtype("<i8"), 6 + sum(part.stat().st_size for part in parts) // 8)
        np.array([pieces, rows, *totals]).tofile(file)
        for part in parts:
            with part.open("rb") as written:
                shutil.copyfileobj(written, file)
            part.unlink()


def map_table(folder: Path) -> PackedTable:
    """Maps what `write_table` has written. Raises OSError or ValueError for a damaged file."""
    words = np.load(folder / TABLE_FILE, mmap_mode="r", allow_pickle=False)
    pieces, rows = words[:2].tolist()
    cuts = np.cumsum([6, rows + 1, pieces, (pieces + 1) // 2])
    if cuts[-1] != len(words):
        raise ValueError(f"{len(words)} numbers for {rows} rows of {pieces} pieces")
    bounds, starts, lengths = (words[first:last] for first, last in itertools.pairwise(cuts.tolist()))
    return PackedTable(starts, lengths.view(np.int32)[:pieces], bounds, words[2:6])


def _map_version_1(folder: Path) -> PackedTable:
    """Maps the table of a corpus that was packed at once: runs in progress keep their rows."""
    return PackedTable(*(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in PackedTable._fields))


def _joined(windows: list[PackedTable]) -> PackedTable:
    firsts = np.cumsum([0, *(len(window.starts) for window in windows)])
    bounds = [window.bounds[:-1] + first for window, first in zip(windows, firsts[:-1], strict=True)]
    starts, lengths = (np.concatenate([getattr(window, name) for window in windows]) for name in ("starts", "lengths"))
    numbers = np.sum([window.numbers for window in windows], axis=0)
    return PackedTable(starts, lengths, np.concatenate([*bounds, firsts[-1:]]), np.append(numbers, len(windows)))


def pack(ids: np.ndarray, sequence_length: int, end: int) -> Iterator[PackedTable]:
    """Yields the rows of the documents in `ids`, each of which ends with `end`: those of a window of documents at a time."""
    parts, found, first = max(1, WINDOW_ROWS * sequence_length // AT_ONCE), list[np.ndarray](), 0
    places = range(0, max(1, len(ids)), AT_ONCE)
    for number, place in enumerate(places, 1):
        found.append(np.flatnonzero(np.asarray(ids[place : place + AT_ONCE]) == end) + place)
        if number % parts == 0 or number == len(places):
            ends, found = np.concatenate(found), []
            starts = np.append(first, ends + 1)
            yield pack_documents(starts[:-1], ends, sequence_length)
            first = starts[-1]


def pack_documents(starts: np.ndarray, ends: np.ndarray, sequence_length: int) -> PackedTable:
    """Returns the rows of documents, of which the first and the last token are given."""
    width, lengths = sequence_length + 1, ends - starts + 1
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
