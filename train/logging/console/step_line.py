"""The console during training: one line a step in fixed columns, and at intervals a table of the layers."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from time import monotonic
from typing import Any

from ...config.number_format import short
from ..metrics import max_over_mean, min_over_mean
from .text import ASCII_BARS, Line, Span, bar, duration, plain

UNEVEN = 2.0
"""An expert with this many times its even share is highlighted."""
FULL = 0.95
"""A share of a device's memory above this is highlighted."""


def fitting_spans(record: Mapping[str, Any], total_steps: int, eta_seconds: float | None, width: int | None) -> Line:
    """Returns `step_spans` in `width` characters, without some columns if that is narrow. None: no limit."""
    line = step_spans(record, total_steps, eta_seconds)
    for name in ("MFU ", "grad ", "ETA ", " GB", "drop ", "lr "):
        if width is None or len(plain(line)) <= width:
            break
        texts = [span.text for span in line]
        at = texts.index(name) if name in texts else len(line)
        line = line[: at - 1] + line[at + 1 :] if name == " GB" else line[:at] + line[at + 3 :]
    last = max((at for at, span in enumerate(line) if span.text.strip()), default=0)  # blanks beyond the width would wrap
    return [*line[:last], line[last]._replace(text=line[last].text.rstrip())]


def step_spans(record: Mapping[str, Any], total_steps: int, eta_seconds: float | None = None) -> Line:
    """Returns the line of a record of metrics.jsonl. A dense model has no expert columns."""
    width = len(str(total_steps))
    line = _cell("step", f"{record['step']:>{width}}/{total_steps}", "bold")
    line += _cell("loss", _fixed(record["loss"], 7, 4), "bold red" if record["loss"] != record["loss"] else "bold")
    line += [Span(f"{short(record['tokens_per_second']):>7}"), Span(" tok/s  ", "dim")]
    line += _cell("MFU", f"{_fixed(100 * record['mfu'], 5, 1)}%")
    line += _cell("lr", f"{record['lr']:.1e}".replace("e-0", "e-").replace("e+0", "e+"))
    line += _cell("grad", _fixed(record["grad_norm"], 7, 3))
    if "system/memory_peak_gb" in record:
        share = record["system/memory_share"]
        line += [Span("mem", "dim"), Span(f"{_fixed(100 * share, 4, 0)}%", "bold yellow" if share > FULL else "")]
        line += [Span(f"{_fixed(record['system/memory_peak_gb'], 6, 2)}"), Span(" GB", "dim"), Span("  ")]
    if "moe/load_max_over_mean" in record:
        load, layer = record["moe/load_max_over_mean"], record["moe/load_max_over_mean_layer"]  # of the busiest expert
        line += _cell("load", f"{_fixed(load, 5, 2)}x L{layer:<2}", "bold yellow" if load > UNEVEN else "")
        dropped = record["dropped_fraction"]
        line += _cell("drop", f"{_fixed(100 * dropped, 5, 2)}%", "yellow" if dropped > 0 else "")
    return line + _cell("ETA", f"{duration(eta_seconds):>6}")[:2]


class Eta:
    """Estimates the rest of the run by the tokens per second of the last `window` steps, with evaluations and checkpoints between.

    `tokens(step)`: those of all steps up to `step`, in any unit. The first step of a process is left out, because it waits for
    compilers and caches.
    """

    def __init__(self, total_steps: int, tokens: Callable[[int], int] = int, window: int = 50):
        self._total_steps, self._tokens = total_steps, tokens
        self._times: deque[tuple[int, float]] = deque(maxlen=window + 1)

    def after(self, step: int, now: float | None = None) -> float | None:
        """Returns the seconds left after `step`, which is done now; None while unknown. `now`: seconds of a monotonic clock."""
        self._times.append((step, monotonic() if now is None else now))
        (first_step, first), (last_step, last) = self._times[0], self._times[-1]
        if last_step == first_step:
            return None
        pace = (last - first) / (self._tokens(last_step) - self._tokens(first_step))
        return (self._tokens(self._total_steps) - self._tokens(step)) * pace


def _cell(name: str, value: str, style: str = "") -> Line:
    return [Span(f"{name} ", "dim"), Span(value, style), Span("  ")]


def _fixed(value: float, width: int, decimals: int) -> str:
    """Formats `value` right-aligned in `width` characters, in scientific notation if it is too long."""
    text = f"{value:>{width}.{decimals}f}"
    return text if len(text) <= width else f"{value:>{width}.{max(0, width - 6)}e}"


COLUMNS = 32
"""The most columns of a bar; with more experts a column shows the busiest of several."""
LAYERS = 16
"""The most layers in the table: the least balanced ones."""


def layer_lines(record: Mapping[str, Any], bars: str = ASCII_BARS) -> list[Line]:
    """Returns the table of a record of telemetry.jsonl. `bars`: characters from empty to full (Printer.bars)."""
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
    """Returns a character for each expert: half full is an even share, full twice that or more."""
    shown = min(width, len(counts_E))
    mean = sum(counts_E) / len(counts_E) or 1.0
    edges = [column * len(counts_E) // shown for column in range(shown + 1)]
    return bar([max(counts_E[start:end]) / mean for start, end in pairwise(edges)], 2.0, bars)
