"""Writes the records of all parts as one JSON file and one Markdown file, after each part. Needs no torch."""

import json
import re
from pathlib import Path
from typing import Any

from ..timing import markdown
from .runner import BY_NAME, Record

MOST_BYTES = 16 * 10**6
MOST_CELLS = 160
MOST_CHECKS = 15
"""The number of checks of a part in the Markdown file; the JSON file has all."""


class Report:
    """The report of one run: report.md and report.json in `folder`, at most MOST_BYTES each."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.facts = facts
        self.parts: dict[str, list[Record]] = {}

    def add(self, part: str, record: Record) -> None:
        self.parts.setdefault(part, []).append(record)

    @property
    def failed(self) -> list[tuple[str, Record]]:
        """The failed checks, each with its part."""
        return [(part, one) for part, records in self.parts.items() for one in of(records, "check") if not one["ok"]]

    def write(self) -> None:
        """Write both files atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("report.json", self._json()), ("report.md", self.markdown()[:MOST_BYTES])):
            (self.folder / f"{name}.tmp").write_text(text)
            (self.folder / f"{name}.tmp").replace(self.folder / name)

    def _json(self) -> str:
        """All records; without the checks that passed if the file would be too large."""
        text = json.dumps({**self.facts, "parts": self.parts}, indent=1)
        if len(text) <= MOST_BYTES:
            return text
        short = {name: [one for one in records if not one.get("ok")] for name, records in self.parts.items()}
        return json.dumps({**self.facts, "parts": short})

    def markdown(self) -> str:
        lines = ["# make gpu", "", *(f"- {name}: {value}" for name, value in self.facts.items())]
        lines += ["", markdown(["part", "seconds", "passed", "failed", "skipped", "what"], map(self._counted, self.parts))]
        if self.failed:
            lines += [
                "",
                "## Failed",
                "",
                *(f"- {part}: **{_line(one['name'])}**: {_line(one['text'])}" for part, one in self.failed),
            ]
        for name, records in self.parts.items():
            lines += ["", f"## {name}", "", *_body(records)]
        return "\n".join(lines) + "\n"

    def _counted(self, name: str) -> list[str]:
        records = self.parts[name]
        checks = [one["ok"] for one in of(records, "check")]
        counts = [sum(checks), len(checks) - sum(checks), len(of(records, "skip"))]
        seconds = "".join(f"{one['seconds']:.0f}" for one in of(records, "took"))
        return [name, seconds, *map(str, counts), BY_NAME[name].about]


def of(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def _body(records: list[Record]) -> list[str]:
    lines = [f"- {one['name']}: {_line(str(one['value']))}" for one in of(records, "fact")]
    lines += [f"- skipped: {one['name']}: {_line(one['text'])}" for one in of(records, "skip")]
    tables: dict[str, list[dict[str, Any]]] = {}
    for one in of(records, "row"):
        tables.setdefault(one["table"], []).append(one["cells"])
    for name, rows in tables.items():
        heads = list(dict.fromkeys(head for row in rows for head in row))
        lines += ["", f"{name}:", "", markdown(heads, ([_cell(row.get(head, "")) for head in heads] for row in rows))]
    checks = sorted(of(records, "check"), key=_nearness)[:MOST_CHECKS]
    if checks:
        rows = ([_line(one["name"]), "yes" if one["ok"] else "**NO**", _line(one["text"])] for one in checks)
        lines += ["", f"Checks, the {len(checks)} nearest to their limits:", "", markdown(["check", "passed", "by how much"], rows)]
    lines += [f"\n```text\n{one['text']}\n```" for one in of(records, "log") if one["text"]]
    return lines


def _nearness(check: Record) -> tuple[bool, float]:
    """Sorts failed checks first, then by closeness to the limit."""
    return check["ok"], -check["value"] / check["limit"] if check.get("limit") else -1.0


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _line(str(value))


def _line(text: str) -> str:
    """`text` for a cell of a table: shortened, without line breaks and bars."""
    return re.sub(r"\s+", " ", text).replace("|", "/")[:MOST_CELLS]
