"""One source as an endless sequence of packed rows of S + 1 tokens, the same on all ranks, with a state of a few numbers.

Documents are concatenated, each with its end-of-document token, and cut every S tokens: a row begins with the last token of the
row before.
"""

import logging
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, final

import numpy as np
import xxhash

from ..errors import BadData, DataStop, encode_stop
from ..permutation import COMPUTED, SORTED, permutation, rows_at
from ..token_array import TokenArray
from .documents import DocumentBuffer, TokenizingRanks
from .prefetch import Prefetcher
from .shards import Shards
from .tokenize import HELD_OUT, Tokenization, TokenizedShare, Window, tokenize_share, windows
from .window_facts import WindowFacts, share_round

FREE_BAD_ROWS = 10
LISTED_BAD_ROWS = 100
log = logging.getLogger("tokenyard")


class StreamSettings(NamedTuple):
    """Settings of a streamed source (see DataConfig). `window` and `open_shards` change the order of the data, like `seed`."""

    seed: int
    length: int
    """Tokens of a row, S."""
    window: int = 256
    open_shards: int = 8
    ahead: int = 2
    repeat: bool = True
    max_bad_fraction: float = 0.001
    max_failed_files: int = 0


class ReadFailure(NamedTuple):
    """A row that was skipped, or a file that could not be read from a row on."""

    kind: Literal["bad_row", "file_failed"]
    source: str
    file: str
    row: int
    """For a file: the number of rows read before it failed."""
    reason: str
    number: int
    """Running number of this kind in the source, counted over resumes."""

    def __str__(self) -> str:
        words = f"row {self.row}: " if self.kind == "bad_row" else f"failed after {self.row} rows: "
        return f"{self.source}: {self.file} {words}{self.reason}"


class RowSource(ABC):
    label: str
    fingerprint: str

    @abstractmethod
    def take(self, count: int) -> np.ndarray:
        """Returns where the next `count` rows are, int64 (count,), for `read`; fewer if the source ends. Collective."""

    @abstractmethod
    def read(self, places_B: np.ndarray, at_B: np.ndarray) -> np.ndarray:
        """Returns (rows, S + 1): of the rows taken, which are the rows `at_B` of a global batch, those of this rank. Collective.

        It is called with all rows that were taken since the last call.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Returns where the next row begins, as plain JSON."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Continues from `state`, which any number of ranks and workers may have made."""

    def counts(self) -> dict[str, int]:
        """Returns what was read so far, by name of the metric."""
        return {}

    def read_failures(self) -> list[ReadFailure]:
        """Returns what could not be read since the last call."""
        return []

    def add_failures(self, found: list[ReadFailure]) -> None:
        """Adds failures of another reader of this source: `read_failures` returns them once, even if they occur here again."""
        assert not found, "no row of an array is skipped"


@final
class ArrayRows(RowSource):
    """A tokenized corpus, shuffled anew in each epoch. Its state is the number of rows taken."""

    def __init__(
        self, label: str, tokens: TokenArray, seed: int, length: int, repeat: bool, ranks: TokenizingRanks | None = None
    ) -> None:
        self.label, self.fingerprint, self._ranks = label, tokens.manifest.fingerprint, ranks or TokenizingRanks()
        self._ids, self._length, self._seed, self._repeat = tokens.ids, length, seed, repeat
        self._rows, self._next, self._order = (len(tokens.ids) - 1) // length, 0, COMPUTED

    def take(self, count: int) -> np.ndarray:
        if not self._repeat:
            count = min(count, self._rows - self._next)
        self._next += count
        return np.arange(self._next - count, self._next)

    def read(self, places_B: np.ndarray, at_B: np.ndarray) -> np.ndarray:
        positions = places_B[self._ranks.takes(at_B)]
        rows = rows_at(positions, self._rows, self._order, "train", self.fingerprint, self._seed)
        return self._ids[rows[:, None] * self._length + np.arange(self._length + 1)].astype(np.int64)

    def state(self) -> dict[str, Any]:
        return {"row": self._next, "order": self._order}

    def restore(self, state: dict[str, Any]) -> None:
        self._next, self._order = state["row"], state.get("order", SORTED)


@final
class StreamRows(RowSource):
    """Shards in a seeded order, dealt to slots; a round is one window of rows of every slot.

    With fewer ranks than slots a rank tokenizes whole windows, with more it tokenizes its share of one: each document is tokenized
    by one rank, which keeps its tokens until they are rows of a batch. All ranks know how long it is, so they have the same state,
    and each receives the tokens of its own rows (documents.py).
    """

    def __init__(
        self,
        label: str,
        shards: Shards,
        tokenization: Tokenization,
        settings: StreamSettings,
        ranks: TokenizingRanks,
        pool: ThreadPoolExecutor | None,
    ) -> None:
        self.label = label
        kept = (
            shards.fingerprint,
            tokenization.tokenizer.hash,
            tokenization.held_out,
            tokenization.longest,
            settings.window,
            settings.open_shards,
        )
        self.fingerprint = xxhash.xxh3_128_hexdigest(repr(kept).encode())
        """Hash of everything, except the seed and the length of a row, that the order of the tokens depends on."""
        self._shards, self._tokenization, self._settings, self._ranks, self._pool = shards, tokenization, settings, ranks, pool
        self._slots = min(settings.open_shards, len(shards.names))
        self._bad: list[tuple[str, int, str]] = []
        """Shard, row and reason of the first bad rows, for the error message."""
        self._failed: ReadFailure | None = None
        """The last file that failed."""
        self._read_failures: list[ReadFailure] = []
        self._noted: set[tuple[str, str, int]] = set()
        """Kind, file and row of failures that were returned before they were met here."""
        self.restore({})

    def take(self, count: int) -> np.ndarray:
        length = self._settings.length
        while self._documents.end - self._next < count * length + 1 and self._live:
            self._round()
        count = min(count, max(0, self._documents.end - self._next - 1) // length)
        places_B = self._next + length * np.arange(count)
        self._next += count * length
        while len(self._snapshots) > 1 and self._snapshots[1]["position"] <= self._next:
            self._snapshots.popleft()
        return places_B

    def read(self, places_B: np.ndarray, at_B: np.ndarray) -> np.ndarray:
        rows = self._documents.rows(places_B, at_B, self._settings.length + 1)
        self._documents.drop(self._next)
        return rows

    def state(self) -> dict[str, Any]:
        return {**self._snapshots[0], "offset": self._next - self._snapshots[0]["position"]}

    def restore(self, state: dict[str, Any]) -> None:
        self._epoch: int = state.get("epoch", 0)
        self._cursors: list[tuple[int, int] | None] = [
            (a[0], a[1]) if a else None for a in state.get("slots", [(0, 0)] * self._slots)
        ]
        assert len(self._cursors) == self._slots
        self._counts = Counter[str](state.get("counts", {}))
        self._documents = DocumentBuffer(self._ranks, state.get("position", 0))
        self._next: int = self._documents.end + state.get("offset", 0)
        self._snapshots: deque[dict[str, Any]] = deque([self._snapshot()])
        self._live: dict[int, Prefetcher[Window, TokenizedShare] | None] = {}
        self._open_slots()

    def counts(self) -> dict[str, int]:
        return {"epoch": self._epoch, **self._counts}

    def read_failures(self) -> list[ReadFailure]:
        found, self._read_failures = self._read_failures, []
        return found

    def add_failures(self, found: list[ReadFailure]) -> None:
        self._read_failures += found
        self._noted.update((each.kind, each.file, each.row) for each in found)

    def _round(self) -> None:
        """Reads one window of every live slot: this rank its share, of which the others learn the lengths of the documents."""
        shares = self._tokenize_own()
        owners = {slot: self._owners(slot) for slot in self._live}
        own = {share.slot: share.tokens for share in shares} if isinstance(shares, list) else {}
        for window in share_round(shares, owners, self._settings.window, self._shards.names, self._ranks):
            self._accept(window, owners[window.slot], own.get(window.slot, np.empty(0, np.int32)))
        self._refuse_too_much()
        if not self._live:
            self._next_epoch()
        self._snapshots.append(self._snapshot())

    def _tokenize_own(self) -> list[TokenizedShare] | bytes:
        """Returns this rank's shares of the round, or its error."""
        try:
            return [reader.next() for reader in self._live.values() if reader is not None]
        except Exception as error:  # any error must reach the other ranks, which wait for this one
            if not isinstance(error, DataStop):
                log.error("%s cannot be read", self.label, exc_info=error)
            return encode_stop(error, self._ranks.rank)

    def _accept(self, window: WindowFacts, owners: range, own: np.ndarray) -> None:
        """Counts a window and appends its documents to those of the source."""
        self._cursors[window.slot] = window.after
        if window.after is None:
            del self._live[window.slot]
        held_out, tokens = int((window.lengths == HELD_OUT).sum()), int(window.lengths[window.lengths > 0].sum())
        documents = len(window.lengths) - held_out - len(window.bad)
        self._counts.update(rows=len(window.lengths), documents=documents, held_out=held_out, bad_rows=len(window.bad))
        self._counts.update(bytes=window.bytes, document_tokens=tokens, failed_files=window.failed is not None)
        self._bad += window.bad[: max(0, LISTED_BAD_ROWS - len(self._bad))]
        before = self._counts["bad_rows"] - len(window.bad)
        self._report(ReadFailure("bad_row", self.label, *bad, before + at) for at, bad in enumerate(window.bad, start=1))
        if window.failed:
            self._failed = ReadFailure("file_failed", self.label, *window.failed, self._counts["failed_files"])
            self._report([self._failed])
        rows = np.flatnonzero(window.lengths > 0)
        self._documents.append(window.lengths[rows], np.array(owners)[rows % len(owners)], own)

    def _report(self, found: Iterable[ReadFailure]) -> None:
        for each in found:
            if (key := (each.kind, each.file, each.row)) in self._noted:
                self._noted.remove(key)  # the next epoch returns it again
            else:
                self._read_failures.append(each)

    def _next_epoch(self) -> None:
        if self._counts["documents"] == 0:
            listed = "; ".join(f"{name} row {row}: {reason}" for name, row, reason in self._bad[:5])
            raise BadData(f"{self.label}: no document in {self._counts['rows']} rows{': ' if listed else ''}{listed}")
        if self._settings.repeat:
            self._epoch += 1
            self._counts["failed_files"] = 0
            self._cursors = [(0, 0)] * self._slots
            self._open_slots()

    def _open_slots(self) -> None:
        """Starts prefetchers for the slots that this rank tokenizes; those of other ranks are None."""
        key = (self.fingerprint, self._settings.seed, self._epoch)
        order = permutation(len(self._shards.names), "shards", *key).tolist()
        for slot, cursor in enumerate(self._cursors):
            if cursor is not None:
                items = windows(self._shards, order[slot :: self._slots], cursor, self._settings.window, *key)
                self._live[slot] = self._reader(slot, items)

    def _owners(self, slot: int) -> range:
        """Returns the ranks that tokenize the windows of a slot, row by row in turn."""
        size = self._ranks.size
        return range(slot % size, size, self._slots if size > self._slots else size)

    def _reader(self, slot: int, items: Any) -> Prefetcher[Window, TokenizedShare] | None:
        owners, rank = self._owners(slot), self._ranks.rank
        if rank not in owners:
            return None
        share = (owners.index(rank), len(owners))
        return Prefetcher(
            items,
            lambda window: tokenize_share(window, slot, share, self._tokenization, self._shards),
            self._pool,
            self._settings.ahead,
        )

    def _snapshot(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "slots": [list(cursor) if cursor else None for cursor in self._cursors],
            "position": self._documents.end,
            "counts": dict(self._counts),
        }

    def _refuse_too_much(self) -> None:
        if self._counts["failed_files"] > self._settings.max_failed_files and self._failed:
            raise BadData(f"{self._failed}; data.max_failed_files={self._settings.max_failed_files}")
        bad, rows = self._counts["bad_rows"], self._counts["rows"]
        if text := too_many_bad_rows(self.label, bad, rows, self._bad, self._settings.max_bad_fraction):
            raise BadData(text)


def too_many_bad_rows(label: str, bad: int, rows: int, listed: list[tuple[str, int, str]], fraction: float) -> str | None:
    """Returns the error message if `bad` of `rows` exceed the allowed fraction. `listed`: shard, row and reason of the first."""
    if bad <= max(FREE_BAD_ROWS, fraction * rows):
        return None
    each = "; ".join(f"{name} row {row}: {reason}" for name, row, reason in listed[:LISTED_BAD_ROWS])
    return f"{label}: {bad} bad rows of {rows} are more than data.max_bad_fraction={fraction:g} (10 are free): {each}"
