"""What a person reads: a line for each layout, and of a difference where it begins and what it looks like."""

import textwrap
from typing import TextIO

from ..train.config import Config
from .config import TOLERANCE, ParityConfig
from .finding import KINDS
from .layouts import Layout
from .verdict import Verdict, layer_of

COLUMNS = list(dict.fromkeys(KINDS.values()))
WIDE = 100


class Report:
    """Prints a table line by line."""

    def __init__(self, config: Config, settings: ParityConfig, layouts: list[Layout], out: TextIO) -> None:
        self.out = out
        self.width = max([6, *(len(layout.text) for layout in layouts)])
        m, moe, batch = config.model, config.model.moe, config.batch.sequences
        experts = f"{moe.experts} experts, top {moe.top_k}, " if moe.experts else ""
        made = "made small: " if settings.shrink else ""
        lines = [
            f"{made}{m.layers} layers{f' + {m.mtp_depth} mtp' if m.mtp_depth else ''}, {m.width} wide, {experts}"
            f"{settings.steps} steps of {batch} x {config.sequence_length} tokens, fp64, gloo",
            f"largest relative difference from one process; equal is up to {TOLERANCE:g}",
            "",
            f"ranks  {'layout':{self.width}}" + "".join(f"{column:>10}" for column in COLUMNS),
        ]
        self._print(*lines)

    def row(self, verdict: Verdict) -> None:
        """The line of a layout; below it, what is wrong."""
        cells = "".join(f"{self._cell(verdict, column):>10}" for column in COLUMNS)
        mark = "" if verdict.equal else "  FAILED" if verdict.error else "  DIFFERS"
        self._print(f"{verdict.ranks:5}  {verdict.layout:{self.width}}{cells}{mark}")

    def end(self, verdicts: list[Verdict], seconds: float) -> None:
        """The differences, and one line that says it all."""
        wrong = [verdict for verdict in verdicts if not verdict.equal]
        causes = common_causes(verdicts)
        for verdict in wrong[:3]:
            self._print("", *explained(verdict, causes))
        if len(wrong) > 3:
            self._print("", f"and {len(wrong) - 3} more: --json has all of them")
        worst = max((value for verdict in verdicts for value in verdict.differences.values()), default=0.0)
        equal = f"all {len(verdicts)} layouts give the numbers of one process (largest difference {worst:.1e})"
        unequal = f"{len(wrong)} of {len(verdicts)} layouts differ from one process"
        self._print("", f"{unequal if wrong else equal}, {seconds:.0f} s")

    def _cell(self, verdict: Verdict, column: str) -> str:
        values = [value for kind, value in verdict.differences.items() if KINDS[kind] == column]
        return "-" if not values else "0" if max(values) == 0 else f"{max(values):.1e}"

    def _print(self, *lines: str) -> None:
        print(*lines, sep="\n", file=self.out, flush=True)


def explained(verdict: Verdict, causes: set[str]) -> list[str]:
    """The first tensor that differs, and the hints that explain all layouts (or, if none does, those about this one)."""
    where = f"{verdict.ranks} ranks, {verdict.layout}"
    first = verdict.first
    if first is None:
        return _wrapped(f"{where}: {verdict.error}", "")
    layer = f"({layer_of(first.name)})" if layer_of(first.name) else ""
    others = f", and on rank {', '.join(str(rank) for rank in first.ranks if rank != first.rank)}" if len(first.ranks) > 1 else ""
    size = f" by {first.difference:.2g}" if first.difference else ""
    what = " ".join(filter(None, [first.kind, f"of {first.name}" if first.name else "", layer]))
    lines = _wrapped(f"{where}: first in step {first.step} the {what} {first.fault}{size} on rank {first.rank}{others}", "")
    for hint in [hint for hint in verdict.hints if hint.cause in causes] or verdict.hints:
        lines += _wrapped(f"hint: {hint.text}", "  ")
    return lines


def common_causes(verdicts: list[Verdict]) -> set[str]:
    """The causes that every layout that differs may have; a degree that a layout without a difference has too is none."""
    causes = [{hint.cause for hint in verdict.hints} for verdict in verdicts if verdict.first is not None]
    harmless = {name for verdict in verdicts if verdict.equal for name in verdict.numbers}
    common = set.intersection(*causes) if causes else set()
    return {cause for cause in common if cause.removeprefix("1 / ") not in harmless} or common


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDE, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)
