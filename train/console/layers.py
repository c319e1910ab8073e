"""A small table of the layers now and then: where the load goes, which expert has most, what is dropped, how sure the router is."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..metrics import max_over_mean, min_over_mean
from .console import UNEVEN
from .text import ASCII_BARS, Line, Span, bar

COLUMNS = 32
"""At most, of a bar; with more experts a column shows the busiest of several."""
LAYERS = 16
"""More layers than this, and only the least balanced are shown."""


def layer_lines(record: Mapping[str, Any], bars: str = ASCII_BARS) -> list[Line]:
    """The table of a record of telemetry.jsonl. `bars`: characters from empty to full (Printer.bars)."""
    rows = list(range(len(record["layers"])))
    shown = sorted(sorted(rows, key=lambda row: -max_over_mean(record["counts_LE"][row]))[:LAYERS])
    width = max(len("load"), min(COLUMNS, len(record["counts_LE"][0])))
    some = f", the {LAYERS} least balanced of {len(rows)}" if len(shown) < len(rows) else ""
    title = f"  layers over {record['steps']} steps to step {record['step']}{some}"
    head = f"  layer  {'load':<{width}}  most  expert  least   drop  entropy"
    return [[Span(title, "bold")], [Span(head, "cyan")], *(_row(record, row, width, bars) for row in shown)]


def _row(record: Mapping[str, Any], row: int, width: int, bars: str) -> Line:
    counts_E: Sequence[int] = record["counts_LE"][row]
    most, least, total = max_over_mean(counts_E), min_over_mean(counts_E), max(1, sum(counts_E))
    dropped = record["dropped_L"][row] / total
    return [
        Span(f"  {record['layers'][row]:>5}  "),
        Span(f"{load_bar(counts_E, width, bars):<{width}}", "green"),
        Span(f"  {most:>4.2f}", "bold yellow" if most > UNEVEN else ""),
        Span(f"  {counts_E.index(max(counts_E)):>6}"),
        Span(f"  {least:>5.2f}", "bold red" if least == 0 else ""),
        Span(f"  {100 * dropped:>4.1f}%", "yellow" if dropped > 0 else ""),
        Span(f"  {record['router_entropy_L'][row]:>7.3f}"),
    ]


def load_bar(counts_E: Sequence[int], width: int, bars: str) -> str:
    """A character for each expert: half full is an even share, full twice that or more."""
    shown = min(width, len(counts_E))
    mean = sum(counts_E) / len(counts_E) or 1.0
    edges = [column * len(counts_E) // shown for column in range(shown + 1)]
    return bar([max(counts_E[start:end]) / mean for start, end in pairwise(edges)], 2.0, bars)
