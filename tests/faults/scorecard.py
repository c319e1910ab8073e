"""The scorecard of `make faults`: a row for each fault, from the reports of the tests that are marked with it.

TOKENYARD_SCORECARD=print prints it after the tests; =joined with what the last session without a scorecard found in other tests;
=write also writes the tables of docs/faults.md.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from catalogue import FAULTS, MEASURES

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
WISH = "TOKENYARD_SCORECARD"
REMEMBERED = "tokenyard/faults"
"""In pytest's cache: what the last session without a scorecard found, by test."""
Found = dict[str, list[tuple[str, list[int], list[str]]]]
"""By test: the outcome of each report that counts, the faults, and the figures."""


class Row(NamedTuple):
    number: int
    outcome: str
    """passed, failed or missing."""
    tests: int
    measured: str
    """Figures that the tests recorded."""


def found_in(reports: Iterable[Any]) -> Found:
    """What the reports of a session say about faults."""
    found: Found = defaultdict(list)
    for report in reports:
        properties = getattr(report, "user_properties", [])
        numbers = sorted({value for name, value in properties if name == "fault"})
        if numbers and (report.when == "call" or report.outcome != "passed"):
            found[report.nodeid].append((report.outcome, numbers, [value for name, value in properties if name == "measured"]))
    return found


def rows_of(found: Found) -> list[Row]:
    """The verdicts. A fault is passed if all of its tests are, and missing without any."""
    outcomes, figures = defaultdict(list), defaultdict(dict)
    for outcome, numbers, measured in (each for several in found.values() for each in several):
        for number in numbers:
            outcomes[number].append(outcome)
            figures[number] |= dict.fromkeys(measured)
    return [_row(number, outcomes[number], figures[number]) for number in FAULTS]


def lines_of(rows: list[Row]) -> list[str]:
    """As text, a line each."""
    found = [f"{row.number:>3}  {row.outcome:<8} {FAULTS[row.number][0]}: {row.measured or '-'}" for row in rows]
    return [*found, f"{sum(row.outcome == 'passed' for row in rows)} of {len(rows)} faults survived"]


def write(rows: list[Row], document: Path = DOCUMENT) -> None:
    """Put both tables between their marks in the document."""
    text = document.read_text()
    for name, table in (("faults", _fault_table(rows)), ("measures", _measure_table(rows))):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        text = re.sub(f"{begin}.*?{end}", lambda _: "\n".join([begin, *table, end]), text, flags=re.S)  # noqa: B023
    document.write_text(text)


def report(terminal: Any) -> None:
    """After the tests, if it is wished for; else what they found is remembered."""
    wish, cache = os.environ.get(WISH), terminal.config.cache
    found = found_in(report for reports in terminal.stats.values() for report in reports if hasattr(report, "when"))
    if not wish:
        return cache.set(REMEMBERED, found)
    rows = rows_of(cache.get(REMEMBERED, {}) | found if wish == "joined" else found)
    terminal.section("scorecard")
    for line in lines_of(rows):
        terminal.write_line(line)
    if wish == "write":
        write(rows)
    return None


def _row(number: int, outcomes: list[str], figures: dict[str, None]) -> Row:
    if not outcomes:
        return Row(number, "missing", 0, "")
    good = all(outcome == "passed" for outcome in outcomes)
    return Row(number, "passed" if good else "failed", len(outcomes), "; ".join(figures))


def _fault_table(rows: list[Row]) -> list[str]:
    head = ["| # | fault | expected | measured | |", "| --- | --- | --- | --- | --- |"]
    return [*head, *(f"| {r.number} | {' | '.join(FAULTS[r.number])} | {r.measured or '-'} | {r.outcome} |" for r in rows)]


def _measure_table(rows: list[Row]) -> list[str]:
    by_number = {row.number: row for row in rows}
    head = ["| measure | target | reached |", "| --- | --- | --- |"]
    return [*head, *(f"| {name} | {target} | {_reached([by_number[n] for n in numbers])} |" for name, target, numbers in MEASURES)]


def _reached(rows: list[Row]) -> str:
    return "; ".join(f"{row.outcome}: {row.measured}" if row.measured else f"{row.outcome}" for row in rows)
