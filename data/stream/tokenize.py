"""From rows to tokens: cuts shards into windows of rows and tokenizes a rank's share of each."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import xxhash

from ..permutation import permutation
from ..tokenizer_types import Tokenizer
from .shards import BadRow, FailedShard, Row, Shards

HELD_OUT = -1
"""In place of the length of a document that is kept for validation."""


class Window(NamedTuple):
    """Neighbouring rows of one shard, shuffled."""

    shard: int
    numbers: list[int]
    """Index in the shard of each row."""
    rows: list[Row]
    after: tuple[int, int] | None
    """Where the next window begins: position in the order of the shards, and row. None after the last window of an epoch."""
    failed: tuple[int, str] | None = None
    """If the shard cannot be read any further: the number of rows read, and the reason."""


class Tokenization(NamedTuple):
    """How rows become tokens."""

    tokenizer: Tokenizer
    held_out: float
    """Share of the documents that are kept for validation."""
    longest: int
    """Bytes of a document."""


class TokenizedShare(NamedTuple):
    """A rank's share of a window, as tokens."""

    slot: int
    shard: int
    rows: int
    """Of the whole window."""
    after: tuple[int, int] | None
    share: tuple[int, int]
    """(first, step): it has the rows `first`, `first + step`, ... of the window."""
    lengths: list[int]
    """Tokens of each row: 0 for a bad row, HELD_OUT for a validation document."""
    bad: list[tuple[str, int, str]]
    """Shard, row and reason, in the order of the rows."""
    failed: tuple[str, int, str] | None
    """If the shard cannot be read any further: its name, the number of rows read, and the reason."""
    bytes: int
    """UTF-8 bytes of the documents."""
    tokens: np.ndarray
    """int32: the documents, each with its end-of-document token."""


def windows(shards: Shards, order: Sequence[int], start: tuple[int, int], size: int, *key: object) -> Iterator[Window]:
    """Yields the windows of the shards `order` from (position, row) `start` on. `key` seeds the shuffle of the rows inside each.

    The last window of an epoch has no rows: only at the end is it known that the one before was the last.
    """
    beginning, first = start
    for place in range(beginning, len(order)):
        shard, numbers, rows, failed = order[place], [], [], None
        for number, row in enumerate(shards.rows(shard, first), first):
            if isinstance(row, FailedShard):
                failed = (number, row.reason)
                break
            numbers.append(number)
            rows.append(row)
            if len(rows) == size:
                yield _shuffled(Window(shard, numbers, rows, (place, number + 1)), *key)
                numbers, rows = [], []
        if rows or failed:
            yield _shuffled(Window(shard, numbers, rows, (place + 1, 0), failed), *key)
        first = 0
    yield Window(-1, [], [], None)


def _shuffled(window: Window, *key: object) -> Window:
    order = permutation(len(window.rows), "rows", *key, window.shard, *window.numbers[:1]).tolist()
    return window._replace(numbers=[window.numbers[i] for i in order], rows=[window.rows[i] for i in order])


def tokenize_share(window: Window, slot: int, share: tuple[int, int], tokenization: Tokenization, shards: Shards) -> TokenizedShare:
    """Tokenizes the rows `share` (first, step) of a window."""
    chosen = range(share[0], len(window.rows), share[1])
    found = [parse_row(window.rows[index], tokenization) for index in chosen]
    texts = [text for text in found if isinstance(text, str)]
    encoded = iter(tokenization.tokenizer.encode_documents(texts, threads=1))
    parts, lengths, bad, end = [], [], [], [tokenization.tokenizer.end_of_document]
    for index, item in zip(chosen, found, strict=True):
        ids = next(encoded) if isinstance(item, str) else np.append(item, end) if isinstance(item, np.ndarray) else item
        if isinstance(ids, BadRow):
            bad.append((shards.names[window.shard], window.numbers[index], ids.reason))
        elif ids is not None:
            parts.append(np.asarray(ids, dtype=np.int32))
        lengths.append(HELD_OUT if ids is None else 0 if isinstance(ids, BadRow) else len(ids))
    tokens = np.concatenate(parts, dtype=np.int32) if parts else np.empty(0, np.int32)
    failed = window.failed and (shards.names[window.shard], *window.failed)
    size = sum(len(text.encode()) for text in texts)
    return TokenizedShare(slot, window.shard, len(window.rows), window.after, share, lengths, bad, failed, size, tokens)


def parse_row(row: Row, tokenization: Tokenization) -> str | np.ndarray | BadRow | None:
    """Returns the text or token ids to train on, a BadRow, or None for a validation document."""
    if isinstance(row, BadRow):
        return row
    if isinstance(row, np.ndarray):
        wrong = row[(row < 0) | (row >= tokenization.tokenizer.size)]
        return BadRow(f"id {wrong[0]} is not below the tokenizer's {tokenization.tokenizer.size}") if len(wrong) else row
    if len(row) > tokenization.longest:
        return BadRow(f"{len(row)} bytes, more than data.longest_row={tokenization.longest}")
    if not row.strip():
        return BadRow("empty")
    try:
        text = row.decode()
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    return None if is_held_out(row, tokenization.held_out) else text


def is_held_out(text: bytes, fraction: float) -> bool:
    """Whether a document is kept for validation: by a hash of its text, so that equal documents are in the same split."""
    return xxhash.xxh3_64_intdigest(text) < fraction * 2**64
