"""The table of `tokenyard data inspect`: what each source gives, as plain text in columns."""

from collections import defaultdict
from typing import Any

from ..data.batches import GlobalBatches
from ..data.build import Prepared

COLUMNS = ("source", "share", "tokens", "epoch", "documents", "their tokens", "held out", "bad rows", "duplicates")


def source_table(data: Prepared, name: str, steps: int, length: int) -> list[str]:
    """Lines, after `steps` global batches of rows of `length` tokens. `name`: of a corpus that is one array."""
    train = data.train
    if isinstance(train, GlobalBatches):
        return _table([_whole(data, train, name, steps, length)], "documents: of the corpus; held out: for validation")
    counts: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in train.counts().items():
        label, _, count = key.removeprefix("data/").rpartition("/")
        counts[label][count] = value
    given = dict(zip((source.label for source in train.mixture.sources), train.mixture.rows, strict=True))
    rows = [_streamed(label, given[label] * length, values) for label, values in counts.items()]
    return _table(rows, "documents: read so far, with what is read ahead; held out: for validation")


def _whole(data: Prepared, train: GlobalBatches, name: str, steps: int, length: int) -> list[str]:
    facts, rows = data.facts, steps * train.sequences
    documents = f"{facts.train_documents:,}", f"{facts.train_tokens:,}", f"{facts.validation_documents:,}"
    bad = f"{facts.undecodable + facts.empty:,}", f"{facts.duplicates:,}"
    return [name, f"{1:.4f}", f"{rows * length:,}", f"{(rows - 1) // train.rows:,}", *documents, *bad]


def _streamed(label: str, tokens: int, counts: dict[str, Any]) -> list[str]:
    names = ("epoch", "documents", "document_tokens", "held_out", "bad_rows")
    return [
        label,
        f"{counts['share']:.4f}",
        f"{tokens:,}",
        *(f"{counts[name]:,}" if name in counts else "-" for name in names),
        "-",
    ]


def _table(rows: list[list[str]], note: str) -> list[str]:
    """A column that has nothing to say is left out; the first is aligned to the left, numbers to the right."""
    shown = [index for index in range(len(COLUMNS)) if any(row[index] != "-" for row in rows)]
    lines = [[row[index] for index in shown] for row in [list(COLUMNS), *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in lines
    ]
    return [*aligned, f"({note})"]
