"""`tokenyard import` and `tokenyard export`: their arguments, and one line about the result."""

import argparse
import re
import sys
from pathlib import Path

from ..train.config.complain import complain

ASSIGNMENT = re.compile(r"(\w+)=(-?\d+)")
UPCYCLE_KEYS = ("experts", "top_k", "granularity", "seed")


def import_command(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 2, with one line on standard error, for a folder that cannot be imported."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from ..interop.import_ import import_folder
    from ..interop.upcycle import Upcycle
    from ..train.weight_source import hf_folder

    try:
        upcycling = None if arguments.upcycle is None else Upcycle(**upcycle_settings(arguments.upcycle))
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("of the weights"), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task("0%", total=None)

            def progress(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total, description=f"{done / total:.0%}")

            folder = hf_folder(arguments.folder) or Path(arguments.folder)
            made = import_folder(folder, Path(arguments.out), upcycling, progress)
    except (ValueError, OSError) as error:
        return complain(error)
    return _report(f"{made.architecture}: {made.parameters:,} parameters in {made.checkpoint}", made.notes)


def export_command(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 2, with one line on standard error, for a checkpoint that cannot be exported."""
    from ..train.stored_config import check_readable

    try:
        check_readable(Path(arguments.checkpoint))
        from ..interop.export import export_checkpoint  # imports torch

        made = export_checkpoint(Path(arguments.checkpoint), Path(arguments.folder), arguments.dtype, arguments.architecture)
    except (ValueError, OSError) as error:
        return complain(error)
    return _report(f"{made.architecture}: {len(made.files)} files of weights in {made.folder}", made.notes)


def split_upcycle(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """Returns the arguments without `--upcycle`, and the `key=value` words that follow it; None if there is no --upcycle."""
    if "--upcycle" not in argv:
        return argv, None
    begin = end = argv.index("--upcycle") + 1
    while end < len(argv) and "=" in argv[end] and not argv[end].startswith("-"):
        end += 1
    return argv[: begin - 1] + argv[end:], argv[begin:end]


def upcycle_settings(words: list[str]) -> dict[str, int]:
    """Returns the settings of --upcycle. Raises ValueError for a word that is none, or if `experts` is missing."""
    found: dict[str, int] = {}
    for word in words:
        match = ASSIGNMENT.fullmatch(word)
        if match is None or match[1] not in UPCYCLE_KEYS:
            raise ValueError(
                f"--upcycle {word}: must be a whole number for one of {', '.join(UPCYCLE_KEYS)}; nearest valid: experts=8"
            )
        found[match[1]] = int(match[2])
    if "experts" not in found:
        raise ValueError("--upcycle: must say how many experts; nearest valid: --upcycle experts=8 top_k=2")
    return found


def _report(line: str, notes: list[str]) -> int:
    print(line)
    for note in notes:
        print(f"tokenyard: {note}", file=sys.stderr)
    return 0
