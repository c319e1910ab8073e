"""What `tokenyard data inspect` draws in 80 columns: rows and their tokens, histograms of documents, scripts, duplicates."""

import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ..data.document_stats import DocumentStats
from ..data.tokenizer_types import Tokenizer
from ..train.config.complain import printable

WIDTH = 80
BAR = 32
TEXT_LINES = 4
TOKEN_LINES = 3
SCRIPTS = 12
"""The most rows of the table of scripts."""


def row_lines(index: int, ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """Returns a row of a batch: its size, the beginning of its text, and of its tokens as id and text."""
    ends = ids.count(tokenizer.end_of_document)
    text = _cut(textwrap.wrap(repr(tokenizer.decode(ids)), WIDTH - 2, drop_whitespace=False), TEXT_LINES)
    end = tokenizer.end_of_document
    pieces = [f"{token} {'end' if token == end else repr(tokenizer.decode([token]))}" for token in ids[: 20 * TOKEN_LINES]]
    tokens = _cut(_filled(pieces), TOKEN_LINES)
    lines = [f"row {index}: {len(ids)} tokens, {ends} ends of documents", *(f"  {line}" for line in text), "  tokens:"]
    return [printable(line) for line in (*lines, *(f"    {line}" for line in tokens))]


def _filled(words: list[str]) -> list[str]:
    """Returns lines of words, with two spaces between them."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + 2 > WIDTH - 4:
            lines.append("")
        lines[-1] += f"{'  ' if lines[-1] else ''}{word}"
    return lines


def _cut(lines: list[str], most: int) -> list[str]:
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1][: WIDTH - 8]} ..."]


def stats_lines(stats: DocumentStats) -> list[str]:
    """Returns the pictures of a sample of documents."""
    count, tokens, size = len(stats.tokens), sum(stats.tokens), sum(stats.bytes)
    if not count:
        return ["no documents"]
    ratios = [each / of for each, of in zip(stats.bytes, stats.tokens, strict=True)]
    scripts = stats.scripts.most_common(SCRIPTS)
    characters = max(1, stats.scripts.total())
    lines = [f"{count:,} documents: {tokens:,} tokens, {size:,} bytes, {size / tokens:.2f} bytes a token", ""]
    lines += ["tokens of a document", *histogram(stats.tokens, doubling(max(stats.tokens))), ""]
    lines += ["bytes a token, of a document", *histogram(ratios, even(min(ratios), max(ratios))), ""]
    lines += ["characters by script", *(bar_line(name, number, characters) for name, number in scripts)]
    if len(stats.scripts) > SCRIPTS:
        lines.append(f"  and {len(stats.scripts) - SCRIPTS} more")
    repeats = f"{stats.exact:,} repeat an earlier one exactly ({stats.exact / count:.1%})"
    lines += ["", f"duplicates: {repeats},", f"  {stats.near:,} but for case and spaces ({stats.near / count:.1%})"]
    if stats.exact:
        times, text = stats.most_repeated
        lines.append(f"  {times} times: {printable(repr(text))[: WIDTH - 20]}")
    return lines


def stats_object(stats: DocumentStats) -> dict[str, Any]:
    """Returns the same numbers for --json."""
    return {
        "documents": len(stats.tokens),
        "tokens": sum(stats.tokens),
        "bytes": sum(stats.bytes),
        "tokens_of_each": stats.tokens,
        "bytes_of_each": stats.bytes,
        "characters_by_script": dict(stats.scripts.most_common()),
        "duplicates": stats.exact,
        "duplicates_but_for_case_and_spaces": stats.near,
    }


def doubling(largest: int) -> list[float]:
    """Returns the edges 1, 2, 4, ... of bins up to `largest`."""
    return [2.0**power for power in range(math.floor(math.log2(max(1, largest))) + 2)]


def even(least: float, largest: float) -> list[float]:
    """Returns the edges of up to 12 bins of a round width that hold all of [least, largest]."""
    width = next((each for each in (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 100, 1000) if (largest - least) / each < 11), 1e6)
    first = math.floor(least / width)
    return [width * (first + index) for index in range(math.floor(largest / width) - first + 2)]


def histogram(values: Sequence[float], edges: Sequence[float]) -> list[str]:
    """Returns a line for each bin [edge, next edge) from the first with a value to the last."""
    counts = [sum(low <= value < high for value in values) for low, high in pairwise(edges)]
    held = [index for index, count in enumerate(counts) if count]
    names = [f"{low:,.4g} to {high:,.4g}" if low % 1 or high % 1 else f"{low:,.0f} to {high:,.0f}" for low, high in pairwise(edges)]
    return [bar_line(names[index], counts[index], len(values)) for index in range(held[0], held[-1] + 1)]


def bar_line(name: str, count: int, total: int) -> str:
    """Returns a name, a bar of the share of `total`, the share and the number, in 80 columns."""
    marks = "#" * math.ceil(BAR * count / total - 1e-9)
    return f"  {name[:24]:<24} {marks:<{BAR}} {count / total:6.1%} {count:>12,}"[:WIDTH]
