"""`tokenyard parity`: from the words of the command line to verdicts about all layouts. The ranks alone import torch."""

import json
import sys
from collections.abc import Iterator
from time import perf_counter
from typing import Any, TextIO

from ..train.command import refuse
from ..train.compose import compose
from ..train.config import Config, ConfigError
from ..train.plain import plain_config
from .config import ParityConfig, split_settings
from .finding import Finding
from .layouts import Layout, automatic, checked, legal, listed, prepared, sees_accumulation
from .ranks import Done, Job, Ranks
from .report import Report
from .shrink import shrink
from .verdict import Verdict, judge, place

LIMIT_SECONDS = 120.0
"""For one layout of a model that was made small."""


def parity_command(words: list[str], as_json: bool = False, out: TextIO | None = None) -> int:
    """Compares each layout with one process and prints a table. Returns 0 if all are equal, 1 if one is not, 2 if it cannot run."""
    begin = perf_counter()
    try:
        settings, overrides = split_settings(words)
        config, layouts = planned(settings, overrides)
    except ConfigError as error:
        return refuse(error)
    report = Report(config, settings, layouts, sys.stderr if as_json else out or sys.stdout)
    verdicts = []
    for verdict in compared(config, settings, layouts):
        report.row(verdict)
        verdicts.append(verdict)
    report.end(verdicts, perf_counter() - begin)
    if as_json:
        facts = {"seconds": round(perf_counter() - begin, 1), "layouts": [verdict.plain() for verdict in verdicts]}
        print(json.dumps({"equal": all(verdict.equal for verdict in verdicts), **facts}), file=out or sys.stdout)
    return int(not all(verdict.equal for verdict in verdicts))


def planned(settings: ParityConfig, overrides: list[str]) -> tuple[Config, list[Layout]]:
    """The configuration of one process, and the layouts to compare it with. ConfigError for what cannot be compared."""
    given = prepared(compose(overrides))
    wanted = [] if settings.layouts == "auto" else listed(settings.layouts)
    most = max((layout.ranks for layout in wanted), default=settings.ranks)
    config = shrink(given, max(most, settings.ranks)) if settings.shrink else given
    # The rules of the model as it is count too; only its batch may be another.
    given.batch = config.batch
    if wanted:
        wanted = [checked(given, layout) for layout in wanted]
        for layout in wanted:
            checked(config, layout)
        return config, wanted
    return config, [layout for layout in automatic(given, settings.ranks) if legal(config, layout)]


def compared(config: Config, settings: ParityConfig, layouts: list[Layout]) -> Iterator[Verdict]:
    """A verdict for each layout, in their order. Starts the ranks and ends them."""
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


def _job(config: Config, layout: Layout, settings: ParityConfig, limit: float, reference: str, name: str | None) -> Job:
    call: dict[str, Any] = {"config": plain_config(layout.applied(config)), "steps": settings.steps, "reference": reference}
    return Job(name or reference, layout.ranks, call if name else call | {"rank": None}, limit)


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
