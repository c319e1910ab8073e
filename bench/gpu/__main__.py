"""`make gpu`, or `python -m tokenyard.bench.gpu`: runs the parts one after the other and reports. This process needs no torch."""

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .report import Report
from .runner import BY_NAME, PARTS, TINY_FACTOR, TOTAL_SECONDS, Record, Runner

ROOT = Path(__file__).resolve().parents[2]


def main(words: list[str] | None = None) -> int:
    """Returns 1 if a check failed, else 0."""
    arguments = parse(words)
    report = Report(Path(arguments.out), facts(arguments))
    print(f"make gpu: {', '.join(f'{name} {value}' for name, value in report.facts.items())}", flush=True)
    runner = Runner(arguments.device, arguments.scale, time.monotonic() + arguments.seconds)
    try:
        for part in arguments.part:
            print(f"\n[{part.name}] {part.about}", flush=True)
            for record in runner.run(part):
                report.add(part.name, record)
                print_record(record)
            report.write()
    finally:
        runner.close()
        report.write()
    print(f"\n{len(report.failed)} checks failed; {report.folder / 'report.md'} and report.json have all of it", flush=True)
    return 1 if report.failed else 0


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full", help="tiny tries the code within minutes on a CPU")
    parser.add_argument("--part", nargs="+", choices=BY_NAME, default=[part.name for part in PARTS], help="these parts only")
    parser.add_argument("--out", default=f"runs/gpu-{time.strftime('%Y%m%d-%H%M%S')}", help="folder for report.md and report.json")
    parser.add_argument("--seconds", type=float, help=f"when all must be over; {TOTAL_SECONDS:.0f} on a GPU")
    arguments = parser.parse_args(words)
    factor = TINY_FACTOR if arguments.device == "cpu" else 1.0
    arguments.seconds = arguments.seconds or factor * TOTAL_SECONDS
    first = [] if "machine" in arguments.part else ["machine"]
    arguments.part = [BY_NAME[name]._replace(seconds=factor * BY_NAME[name].seconds) for name in [*first, *arguments.part]]
    return arguments


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Facts that do not need torch."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": arguments.device,
        "scale": arguments.scale,
        "Python": platform.python_version(),
        "commit": commit(),
        "from .gpu/": os.environ.get("TOKENYARD_GPU_WHEELS") or "nothing",
    }


def commit() -> str:
    """The commit of the repository; unknown without git or outside of a repository."""
    try:
        shown = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return shown.stdout.strip()


def print_record(record: Record) -> None:
    """Prints each record except for checks that passed."""
    match record["kind"]:
        case "check" if not record["ok"]:
            print(f"  FAILED {record['name']}: {record['text']}", flush=True)
        case "skip":
            print(f"  skipped {record['name']}: {record['text']}", flush=True)
        case "fact":
            print(f"  {record['name']}: {record['value']}", flush=True)
        case "row":
            print(
                f"  {', '.join(f'{head} {value}' for head, value in record['cells'].items() if value not in ('', None))}",
                flush=True,
            )
        case "took":
            print(f"  {record['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
