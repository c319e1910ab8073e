"""`tokenyard report`: reads the runs and writes the page and the pictures."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..train.config.complain import complain, printable
from .journal_reader import RunError
from .page import page
from .payload import payload
from .run_reader import Run, run_folders, without_run


def report_command(arguments: Namespace) -> int:
    """Writes `report.html` and the pictures into --out, by default `report/` of the first folder, a run's or a sweep's. Returns the
    exit code."""
    try:
        runs = [Run(folder) for word in arguments.runs for folder in run_folders(Path(word))]
        out = Path(arguments.out or Path(arguments.runs[0]) / "report")
        out.mkdir(parents=True, exist_ok=True)
        data = payload(runs, without_run=sum(without_run(Path(word)) for word in arguments.runs))
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
