"""`tokenyard report`: reads the runs and writes the page and the pictures."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..train.config.complain import complain, printable
from .journal_reader import RunError
from .page import page
from .payload import payload
from .run_reader import Run


def report_command(arguments: Namespace) -> int:
    """Writes `report.html` and the pictures into --out, by default `report/` of the first run. Returns the exit code."""
    try:
        runs = [Run(Path(folder)) for folder in arguments.runs]
        out = Path(arguments.out) if arguments.out else runs[0].folder / "report"
        out.mkdir(parents=True, exist_ok=True)
        data = payload(runs)
        (out / "report.html").write_text(page(data), encoding="utf-8")
    except (RunError, OSError) as error:
        return refuse(error)
    for run in runs:
        for remark in run.remarks():
            print(f"tokenyard: {printable(remark)}", file=sys.stderr)
    print(f"wrote {printable(', '.join([str(out / 'report.html'), *pictures(data, out)]))}")
    return 0


def pictures(data: dict[str, Any], folder: Path) -> list[str]:
    """Writes the PNGs and returns their names; prints a hint if matplotlib is not installed."""
    from .pictures import write_pictures

    try:
        return write_pictures(data, folder)
    except ImportError:
        print("tokenyard: no pictures beside the page; for these: pip install 'tokenyard[report]'", file=sys.stderr)
        return []


def refuse(error: Exception) -> int:
    """Prints the error in one line. Returns the exit code."""
    return complain(error)
