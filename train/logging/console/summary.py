"""The summary at the end of a run: the loss, the load of the experts, a sample of the model, and commands to try next."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...config.number_format import short
from ...evaluation import Evaluation
from ..metrics import max_over_mean, min_over_mean
from .step_line import UNEVEN, load_bar
from .text import ASCII_BARS, Line, Span, commands, duration, printable, rows, title

Sample = tuple[str, str]
"""A prompt and what the model wrote after it."""

COLUMNS = 64
"""The most columns of the bar chart; with more experts a column shows the busiest of several."""


@dataclass
class EndFacts:
    """What the summary shows. Losses are in nats per token, on the validation split."""

    steps: int
    """Steps of the whole run."""
    tokens: int
    """Tokens of the whole run."""
    seconds: float
    """Age of this process."""
    validation_loss: float
    bits_per_byte: float
    unigram_entropy: float
    """The loss of the best model without context, on the same tokens."""
    counts_LE: Sequence[Sequence[int]]
    """Choices of each expert in the validation pass."""
    layers: Sequence[int]
    """The block index of each row of counts_LE."""
    checkpoint: str | None
    """The path of the last checkpoint; None if none was written."""
    sample: Sample | None = None
    commands: list[tuple[str, str]] = field(default_factory=list)
    """Purpose and command of what to try next."""
    outcome: str = "Done"
    """How the run ended: Done or Stopped."""


def end_lines(facts: EndFacts, bars: str = ASCII_BARS) -> list[Line]:
    """Returns the summary. `bars`: characters of the bar chart from empty to full (Printer.bars)."""
    lines = [
        [],
        title(f"{facts.outcome}: {facts.steps:,} steps, {short(facts.tokens)} tokens, {duration(facts.seconds)}"),
        *_loss(facts),
    ]
    if facts.counts_LE:
        lines += _load_table(facts, bars)
    if facts.sample:
        lines += [[], title("Sample"), *sample_lines(*facts.sample)]
    lines += [[], *rows([("checkpoint", facts.checkpoint or "none was written")])]
    return [*lines, *([[], title("Try next"), *commands(facts.commands)] if facts.commands else [])]


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """Returns what is said about a validation pass: its loss, that of each source, and the results of probes and tasks."""
    about = f"{evaluation.bits_per_byte:.4f} bits a byte, over {evaluation.tokens:,} tokens"
    lines = [f"validation loss {evaluation.loss:.4f}, {about}"]
    for name, source in evaluation.sources.items():
        about = f"{source.bits_per_byte:.4f} bits a byte, over {source.tokens:,.0f} tokens"
        lines.append(f"validation on {name}: loss {source.per_token:.4f}, {about}")
    scores = evaluation.scores
    for key, value in scores.items():
        kind, _, name = key.partition("/")
        if kind == "tasks":
            lines.append(f"task {name}: {value:.4f}")
        elif not name.endswith("_chance"):
            lines.append(f"probe {name.replace('_', ' ')}: {value:.1%} right, {scores[f'{key}_chance']:.1%} by chance")
    return lines


def _loss(facts: EndFacts) -> list[Line]:
    value = math.exp(min(facts.validation_loss, 700.0))
    perplexity = f"{value:.4g}" if value < 1e4 else f"{value:.2e}"
    below = 100 * (1 - facts.validation_loss / facts.unigram_entropy)
    side = f"{abs(below):.1f}% {'below' if below >= 0 else 'above'} it"
    validation = Span(
        f"loss {facts.validation_loss:.4f} nats a token, perplexity {perplexity}, {facts.bits_per_byte:.4f} bits a byte", "bold"
    )
    (first,) = rows([("validation", "")])
    return [
        [*first[:1], validation],
        *rows([("unigram", f"entropy {facts.unigram_entropy:.4f} nats a token; the loss is {side}")]),
    ]


def _load_table(facts: EndFacts, bars: str) -> list[Line]:
    """Returns a row for each layer: max/mean, min/mean and the load of each expert, in order of their ids."""
    shown = min(COLUMNS, len(facts.counts_LE[0]))
    scale = f"each expert: {bars[0]} none, {bars[len(bars) // 2]} even, {bars[-1]} twice or more"
    head = [[], title("Expert load"), [Span(f"  {'layer':>5}  {'max/mean':>8}  {'min/mean':>8}   {scale}", "cyan")]]
    return [*head, *(_load_row(layer, row, shown, bars) for layer, row in zip(facts.layers, facts.counts_LE, strict=True))]


def _load_row(layer: int, counts_E: Sequence[int], shown: int, bars: str) -> Line:
    most, least = max_over_mean(counts_E), min_over_mean(counts_E)
    return [
        Span(f"  {layer:>5}  "),
        Span(f"{most:>8.2f}", "bold yellow" if most > UNEVEN else ""),
        Span("  "),
        Span(f"{least:>8.2f}", "bold red" if least == 0 else ""),
        Span("   "),
        Span((" " if shown <= 32 else "").join(load_bar(counts_E, shown, bars)), "green"),
    ]


def sample_lines(prompt: str, text: str) -> list[Line]:
    """Returns prompt and text behind a margin."""
    head, *rest = (printable(prompt) + "\0" + printable(text)).split("\n")
    lines = []
    style = "bold"
    for part in (head, *rest):
        before, mark, after = part.partition("\0")
        lines.append([Span("  | ", "dim"), Span(before, style), Span(after)])
        style = "" if mark else style
    return lines
