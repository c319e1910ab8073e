"""`tokenyard parity`: from the command line to a verdict on each layout. Only the ranks import torch."""

import json
import sys
import textwrap
from collections.abc import Iterator
from time import perf_counter
from typing import Any, TextIO

from ..train.config.compose import compose
from ..train.config.config import Config, ConfigError
from ..train.config.serialize import plain_config
from ..train.rank_command import refuse
from .choose_layouts import Layout, all_layouts, fit_layout, is_legal, parse_layouts, prepare_config, sees_accumulation
from .config import TOLERANCE, ParityConfig, split_settings
from .diagnose import Verdict, judge, layer_of, place
from .finding import KINDS, Finding
from .rank_pool import Done, RankCall, Ranks
from .shrink import shrink

# The table for the user: a line for each layout, and an explanation of each difference.

COLUMNS = list(dict.fromkeys(KINDS.values()))
WIDE = 100


class ParityTable:
    """Prints the table, one line at a time."""

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
        """Prints the line of a layout."""
        cells = ""
        for column in COLUMNS:
            values = [value for kind, value in verdict.differences.items() if KINDS[kind] == column]
            cell = "-" if not values else "0" if max(values) == 0 else f"{max(values):.1e}"
            cells += f"{cell:>10}"
        mark = "" if verdict.equal else "  FAILED" if verdict.error else "  DIFFERS"
        self._print(f"{verdict.ranks:5}  {verdict.layout:{self.width}}{cells}{mark}")

    def end(self, verdicts: list[Verdict], seconds: float) -> None:
        """Prints the explanations of differences, and a summary."""
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

    def _print(self, *lines: str) -> None:
        print(*lines, sep="\n", file=self.out, flush=True)


def explained(verdict: Verdict, causes: set[str]) -> list[str]:
    """Returns the first tensor that differs, and the hints that explain all layouts, or else this one."""
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
    """Returns the causes that every layout that differs may have; a degree that a layout without a difference has too is none."""
    causes = [{hint.cause for hint in verdict.hints} for verdict in verdicts if verdict.first is not None]
    harmless = {name for verdict in verdicts if verdict.equal for name in verdict.numbers}
    common = set.intersection(*causes) if causes else set()
    return {cause for cause in common if cause.removeprefix("1 / ") not in harmless} or common


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDE, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


LIMIT_SECONDS = 120.0
"""Time limit for one layout of a shrunk model."""

STAGES = 4
"""Of two ranks in every schedule, for which the layers of a model must suffice if layouts=auto makes it small."""


def parity_command(words: list[str], as_json: bool) -> int:
    """Compares each layout with one process and prints a table. Returns 0 if all are equal, 1 if one differs, 2 if none can run."""
    begin = perf_counter()
    try:
        settings, overrides = split_settings(words)
        config, layouts = plan_comparison(settings, overrides)
    except ConfigError as error:
        return refuse(error)
    report = ParityTable(config, settings, layouts, sys.stderr if as_json else sys.stdout)
    verdicts = []
    for verdict in compare_layouts(config, settings, layouts):
        report.row(verdict)
        verdicts.append(verdict)
    report.end(verdicts, perf_counter() - begin)
    if as_json:
        facts = {"seconds": round(perf_counter() - begin, 1), "layouts": [verdict.plain() for verdict in verdicts]}
        print(json.dumps({"equal": all(verdict.equal for verdict in verdicts), **facts}))
    return int(not all(verdict.equal for verdict in verdicts))


def plan_comparison(settings: ParityConfig, overrides: list[str]) -> tuple[Config, list[Layout]]:
    """Returns the configuration of one process, and the layouts to compare. Raises ConfigError for what cannot be compared."""
    given = prepare_config(compose(overrides))
    wanted = [] if settings.layouts == "auto" else parse_layouts(settings.layouts)
    most = max((layout.ranks for layout in wanted), default=settings.ranks)
    stages = max((layout.parallel.pipeline_stages for layout in wanted), default=STAGES if settings.ranks > 1 else 1)
    config = shrink(given, max(most, settings.ranks), stages) if settings.shrink else given
    # The layouts must be legal for the full model too; only its batch may change.
    given.batch = config.batch
    if wanted:
        wanted = [fit_layout(given, layout) for layout in wanted]
        for layout in wanted:
            fit_layout(config, layout)
        return config, wanted
    return config, [layout for layout in all_layouts(given, settings.ranks) if is_legal(config, layout)]


def compare_layouts(config: Config, settings: ParityConfig, layouts: list[Layout]) -> Iterator[Verdict]:
    """Yields the verdict on each layout, in order. Starts and ends the ranks."""
    limit = LIMIT_SECONDS if settings.shrink else config.parallel.timeout_seconds
    apart = sees_accumulation(config.model.moe)
    amounts = sorted({layout.accumulation if apart else 1 for layout in layouts})
    jobs = [_job(config, Layout(accumulation=amount), settings, limit, f"reference_{amount}", None) for amount in amounts]
    by_name = {str(index): layout for index, layout in enumerate(layouts)}
    later = [
        _job(config, layout, settings, limit, f"reference_{layout.accumulation if apart else 1}", name)
        for name, layout in by_name.items()
    ]
    with Ranks(max([1, *(layout.ranks for layout in layouts)])) as ranks:
        for done in ranks.run(jobs):
            if done.error:
                raise RuntimeError(f"one process failed, so there is nothing to compare with: {done.error}")
        yield from _in_order((int(done.job.name), _verdict(by_name[done.job.name], done)) for done in ranks.run(later))


def _job(config: Config, layout: Layout, settings: ParityConfig, limit: float, reference: str, name: str | None) -> RankCall:
    call: dict[str, Any] = {"config": plain_config(layout.applied(config)), "steps": settings.steps, "reference": reference}
    return RankCall(name or reference, layout.ranks, call if name else call | {"rank": None}, limit)


def _verdict(layout: Layout, done: Done) -> Verdict:
    if done.error:
        return Verdict(layout.text, layout.ranks, done.seconds, {}, error=done.error)
    findings = [[Finding(*values) for values in answer["findings"]] for answer in done.answers]
    places = [place(answer["sizes"], rank) for rank, answer in enumerate(done.answers)]
    return judge(layout, findings, places, done.seconds)


def _in_order(numbered: Iterator[tuple[int, Verdict]]) -> Iterator[Verdict]:
    early: dict[int, Verdict] = {}
    due = 0
    for number, verdict in numbered:
        early[number] = verdict
        while due in early:
            yield early.pop(due)
            due += 1
