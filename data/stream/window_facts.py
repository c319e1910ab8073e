"""What all ranks learn about the windows of a round, in messages whose size they know beforehand: none grows with their number."""

import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xxhash

from ..errors import BadData, DataStop, decode_stop
from .documents import TokenizingRanks
from .tokenize import TokenizedShare

ROWS, SHARD, PLACE, ROW, FAILED, BYTES, CHECK, HEAD = range(8)
"""Columns of a window in the table of a round, before the lengths of its rows: its rows, its shard, position (plus 1) and row of
the next window, the row that cannot be read (plus 1), bytes, and a hash of the first five, summed over the ranks that share it."""
TEXT_BYTES = 512
"""Of the reason why a row is bad or a shard fails, with the row's number; a longer one is cut."""


class WindowFacts(NamedTuple):
    """A window, without its tokens; equal on all ranks."""

    slot: int
    after: tuple[int, int] | None
    lengths: np.ndarray
    """Tokens of each row: 0 for a bad row, HELD_OUT for a validation document."""
    bad: list[tuple[str, int, str]]
    """Shard, row and reason."""
    failed: tuple[str, int, str] | None
    bytes: int


def share_round(
    own: list[TokenizedShare] | bytes, owners: dict[int, range], window: int, names: list[str], ranks: TokenizingRanks
) -> list[WindowFacts]:
    """Returns the windows of a round, one for each slot of `owners`: the ranks that tokenize it. Collective.

    own: this rank's shares, or its error (`encode_stop`), which every rank raises. `window`: the most rows of one. `names`: of the
    shards. Costs one all-reduce, and another if there is a bad row or a shard that fails.
    """
    slots = list(owners)
    table = np.zeros((len(slots) + 1, HEAD + window), dtype=np.int64)
    for share in own if isinstance(own, list) else []:
        _fill(table[slots.index(share.slot)], share)
    table[-1, 0] = isinstance(own, bytes)
    table = ranks.add(table)
    if table[-1, 0]:
        raise _first_stop(ranks.gather(b"" if isinstance(own, list) else own))
    assert isinstance(own, list)
    _refuse_difference(table, owners, own, ranks)
    texts = iter(_texts(table, slots, own, ranks))
    return [_facts(table[place], slot, names, texts) for place, slot in enumerate(slots)]


def _fill(row: np.ndarray, share: TokenizedShare) -> None:
    first, step = share.share
    head = [share.rows, share.shard, share.after[0] + 1 if share.after else 0, share.after[1] if share.after else 0]
    head.append(share.failed[1] + 1 if share.failed else 0)
    if first == 0:
        row[: len(head)] = head
    row[BYTES], row[CHECK] = share.bytes, _check(head)
    row[HEAD + first : HEAD + share.rows : step] = share.lengths


def _check(head: list[int]) -> int:
    return xxhash.xxh3_64_intdigest(repr(head).encode()) >> 24  # 40 bits: sums over ranks fit


def _first_stop(gathered: list[bytes]) -> DataStop:
    return decode_stop(next(data for data in gathered if data))


def _refuse_difference(table: np.ndarray, owners: dict[int, range], own: list[TokenizedShare], ranks: TokenizingRanks) -> None:
    """Raises BadData if the ranks that share a window have not read the same rows."""
    if all(row[CHECK] == len(each) * _check(row[:BYTES].tolist()) for row, each in zip(table, owners.values(), strict=False)):
        return
    mine = [f" ({name} row {row}: {reason})" for name, row, reason in (each.failed for each in own if each.failed)]
    failed = {text for data in ranks.gather(json.dumps(mine).encode()) for text in json.loads(data)}
    raise BadData(f"ranks that share a window do not read the same rows{''.join(sorted(failed))}")


def _texts(table: np.ndarray, slots: list[int], own: list[TokenizedShare], ranks: TokenizingRanks) -> list[tuple[int, str]]:
    """Returns number and reason of each bad row, in the order of slots and rows; behind those of a slot, of its failed shard."""
    places = {slot: _bad(row) for slot, row in zip(slots, table, strict=False)}
    firsts = np.cumsum([0, *(len(places[slot]) + int(row[FAILED] > 0) for slot, row in zip(slots, table, strict=False))])
    if not firsts[-1]:
        return []
    words = np.zeros((firsts[-1], TEXT_BYTES // 8), dtype="<i8")
    for share in own:
        first = firsts[slots.index(share.slot)]
        for (_, number, reason), at in zip(share.bad, _own_bad(share), strict=True):
            _write(words[first + np.searchsorted(places[share.slot], at)], number, reason)
        if share.failed and share.share[0] == 0:
            _write(words[first + len(places[share.slot])], *share.failed[1:])
    return [(int(row[0]), row[1:].tobytes().rstrip(b"\0").decode(errors="ignore")) for row in ranks.add(words).astype("<i8")]


def _write(words: np.ndarray, number: int, reason: str) -> None:
    text = reason.encode()[: TEXT_BYTES - 8]
    words[0], words[1:] = number, np.frombuffer(text.ljust(TEXT_BYTES - 8, b"\0"), "<i8")


def _bad(row: np.ndarray) -> np.ndarray:
    """Returns which rows of a window are bad."""
    return np.flatnonzero(row[HEAD : HEAD + row[ROWS]] == 0)


def _own_bad(share: TokenizedShare) -> list[int]:
    first, step = share.share
    return [first + step * index for index, length in enumerate(share.lengths) if length == 0]


def _facts(row: np.ndarray, slot: int, names: list[str], texts: Iterator[tuple[int, str]]) -> WindowFacts:
    after = (int(row[PLACE]) - 1, int(row[ROW])) if row[PLACE] else None
    name = names[row[SHARD]] if row[ROWS] or row[FAILED] else ""
    bad: list[tuple[str, int, str]] = sorted((name, *next(texts)) for _ in _bad(row))
    failed: tuple[str, int, str] | None = (name, *next(texts)) if row[FAILED] else None
    return WindowFacts(slot, after, row[HEAD : HEAD + row[ROWS]], bad, failed, int(row[BYTES]))
