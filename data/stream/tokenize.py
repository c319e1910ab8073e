"""From rows to tokens: cuts shards into windows of rows, tokenizes a rank's share of each, and merges the shares of all ranks."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ..errors import BadData
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
    after: tuple[int, int] | None
    share: tuple[int, int]
    """(first, step): it has the rows `first`, `first + step`, ... of the window."""
    lengths: list[int]
    """Tokens of each row: 0 for a bad row, HELD_OUT for a validation document."""
    bad: list[tuple[str, int, str]]
    """Shard, row and reason."""
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
    return TokenizedShare(
        slot, window.after, share, lengths, sorted(bad), failed, sum(len(text.encode()) for text in texts), tokens
    )


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


def serialize(pieces: list[TokenizedShare]) -> bytes:
    """Returns the bytes for the other ranks: a line of JSON, then the tokens."""
    heads = [[*piece[:-1], len(piece.tokens)] for piece in pieces]
    return json.dumps(heads).encode() + b"\n" + b"".join(piece.tokens.astype("<i4").tobytes() for piece in pieces)


def deserialize(data: bytes) -> list[TokenizedShare]:
    """Returns the inverse of `serialize`."""
    head, _, body = data.partition(b"\n")
    tokens, at, pieces = np.frombuffer(body, "<i4"), 0, []
    for slot, after, share, lengths, bad, failed, size, count in json.loads(head):
        bad = [(name, row, reason) for name, row, reason in bad]
        failed = failed and (failed[0], failed[1], failed[2])
        own = tokens[at : at + count]
        pieces.append(TokenizedShare(slot, after and (after[0], after[1]), (share[0], share[1]), lengths, bad, failed, size, own))
        at += count
    return pieces


def merge_shares(pieces: list[TokenizedShare]) -> TokenizedShare:
    """Merges all shares of one window, in the order of its rows. Raises BadData if the ranks have not read the same rows."""
    if len(pieces) == 1:
        return pieces[0]
    pieces = sorted(pieces, key=lambda piece: piece.share[0])
    count, lengths, parts = len(pieces), [], []
    _refuse_difference(pieces)
    ends = [np.cumsum([max(0, length) for length in piece.lengths]) for piece in pieces]
    for row in range(sum(len(piece.lengths) for piece in pieces)):
        piece, index = pieces[row % count], row // count
        lengths.append(piece.lengths[index])
        end = int(ends[row % count][index])
        parts.append(piece.tokens[end - max(0, lengths[-1]) : end])
    bad = sorted(one for piece in pieces for one in piece.bad)
    tokens = np.concatenate(parts) if parts else pieces[0].tokens
    size, (slot, after, failed) = sum(piece.bytes for piece in pieces), _of_window(pieces[0])
    return TokenizedShare(slot, after, (0, 1), lengths, bad, failed, size, tokens)


def _of_window(piece: TokenizedShare) -> tuple[Any, ...]:
    """Returns what must be equal on all ranks that share a window."""
    return piece.slot, piece.after, piece.failed


def _refuse_difference(pieces: list[TokenizedShare]) -> None:
    total = sum(len(piece.lengths) for piece in pieces)
    shares = [len(range(piece.share[0], total, piece.share[1])) for piece in pieces]
    if len({*map(_of_window, pieces)}) > 1 or shares != [len(piece.lengths) for piece in pieces]:
        failed = sorted({f" ({name} row {row}: {reason})" for name, row, reason in (p.failed for p in pieces if p.failed)})
        raise BadData(f"ranks that share a window do not read the same rows{''.join(failed)}")
