"""What a run ends with: how good the model is, how evenly its experts are used, a sample of it, and what to do next."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ...config.number_format import short
from ..metrics import max_over_mean, min_over_mean
from .step_line import UNEVEN
from .text import ASCII_BARS, Line, Span, bar, commands, duration, plain, printable, rows, title

Sample = tuple[str, str]
"""A prompt and what the model wrote after it."""

COLUMNS = 64
"""At most, of the bar chart; with more experts a column shows the busiest of several."""


@dataclass
class EndFacts:
    """What the end of a run knows. Losses in nats per token, on the validation split."""

    steps: int
    """Done over the whole run."""
    tokens: int
    """Trained on over the whole run."""
    seconds: float
    """Of this process."""
    validation_loss: float
    unigram_entropy: float
    """Loss of the best model that looks at no context, on the same tokens."""
    counts_LE: Sequence[Sequence[int]]
    """Tokens of the validation pass that were routed to each expert of each MoE layer."""
    layers: Sequence[int]
    """The block index of each row of counts_LE."""
    checkpoint: str | None
    """Path of the last checkpoint; None if none was written."""
    sample: Sample | None = None
    commands: list[tuple[str, str]] = field(default_factory=list)
    """What for, and the command: the next ones to try."""
    outcome: str = "Done"
    """How the run ended, such as: Stopped on request."""


def end_summary(facts: EndFacts, bars: str = ASCII_BARS) -> str:
    """The summary as plain text. `bars`: characters of the bar chart from empty to full (Printer.bars)."""
    return "\n".join(map(plain, end_lines(facts, bars)))


def end_lines(facts: EndFacts, bars: str = ASCII_BARS) -> list[Line]:
    """The summary with colours."""
    lines = [
        [],
        title(f"{facts.outcome}: {facts.steps:,} steps, {short(facts.tokens)} tokens, {duration(facts.seconds)}"),
        *_loss(facts),
    ]
    if facts.counts_LE:
        lines += _load_table(facts, bars)
    if facts.sample:
        lines += [[], title("Sample"), *_sample(*facts.sample)]
    lines += [[], *rows([("checkpoint", facts.checkpoint or "none was written")])]
    return [*lines, *([[], title("Try next"), *commands(facts.commands)] if facts.commands else [])]


def _loss(facts: EndFacts) -> list[Line]:
    perplexity = math.exp(min(facts.validation_loss, 700.0))
    below = 100 * (1 - facts.validation_loss / facts.unigram_entropy)
    side = f"{abs(below):.1f}% {'below' if below >= 0 else 'above'} it"
    validation = Span(f"loss {facts.validation_loss:.4f} nats a token, perplexity {_perplexity(perplexity)}", "bold")
    (first,) = rows([("validation", "")])
    return [
        [*first[:1], validation],
        *rows([("unigram", f"entropy {facts.unigram_entropy:.4f} nats a token; the loss is {side}")]),
    ]


def _perplexity(value: float) -> str:
    return f"{value:.4g}" if value < 1e4 else f"{value:.2e}"


def _load_table(facts: EndFacts, bars: str) -> list[Line]:
    """A row a layer: max/mean, min/mean and the load of each expert, in order of their ids."""
    shown = min(COLUMNS, len(facts.counts_LE[0]))
    scale = f"load of each expert: {bars[0]} none, {bars[len(bars) // 2]} an even share, {bars[-1]} twice that or more"
    head = [[], title("Expert load"), [Span(f"  {'layer':>5}  {'max/mean':>8}  {'min/mean':>8}   {scale}", "cyan")]]
    return [*head, *(_load_row(layer, row, shown, bars) for layer, row in zip(facts.layers, facts.counts_LE, strict=True))]


def _load_row(layer: int, counts_E: Sequence[int], shown: int, bars: str) -> Line:
    most, least = max_over_mean(counts_E), min_over_mean(counts_E)
    mean = sum(counts_E) / len(counts_E) or 1.0
    edges = [column * len(counts_E) // shown for column in range(shown + 1)]
    busiest = [max(counts_E[start:end]) / mean for start, end in pairwise(edges)]
    return [
        Span(f"  {layer:>5}  "),
        Span(f"{most:>8.2f}", "bold yellow" if most > UNEVEN else ""),
        Span("  "),
        Span(f"{least:>8.2f}", "bold red" if least == 0 else ""),
        Span("   "),
        Span((" " if shown <= 32 else "").join(bar(busiest, 2.0, bars)), "green"),
    ]


def _sample(prompt: str, text: str) -> list[Line]:
    """Prompt and text as they are, behind a margin."""
    head, *rest = (printable(prompt) + "\0" + printable(text)).split("\n")
    lines = []
    style = "bold"
    for part in (head, *rest):
        before, mark, after = part.partition("\0")
        lines.append([Span("  | ", "dim"), Span(before, style), Span(after)])
        style = "" if mark else style
    return lines
