"""`tokenyard import` and `tokenyard export`: their arguments, and one line about the result."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..train.config.complain import complain
from .progress_bar import progress_bar

if TYPE_CHECKING:
    from ..interop.export import Exported

ASSIGNMENT = re.compile(r"(\w+)=(-?\d+)")
UPCYCLE_KEYS = ("experts", "top_k", "granularity", "seed")


def import_command(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 2, with one line on standard error, for a folder that cannot be imported."""
    from ..interop.import_ import import_folder
    from ..interop.upcycle import Upcycle
    from ..train.weight_source import hf_folder, refuse_absent

    try:
        upcycling = None if arguments.upcycle is None else Upcycle(**upcycle_settings(arguments.upcycle))
        refuse_absent(arguments.folder)
        with progress_bar("of the weights") as progress:
            folder = hf_folder(arguments.folder) or Path(arguments.folder)
            made = import_folder(folder, Path(arguments.out), upcycling, progress)
    except (ValueError, OSError) as error:
        return complain(error)
    facts = {"checkpoint": str(made.checkpoint), "architecture": made.architecture, "parameters": made.parameters}
    line = f"{made.architecture}: {made.parameters:,} parameters in {made.checkpoint}"
    return _report(line, {**facts, "notes": made.notes}, arguments.json)


def export_command(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 2, with one line on standard error, for a checkpoint that cannot be exported."""
    from ..train.stored_config import check_readable

    try:
        check_readable(Path(arguments.checkpoint))
        made = export_with_card(Path(arguments.checkpoint), Path(arguments.folder), arguments.dtype, arguments.architecture)
    except (ValueError, OSError) as error:
        return complain(error)
    facts = {"folder": str(made.folder), "architecture": made.architecture, "files": made.files}
    line = f"{made.architecture}: {len(made.files)} files of weights in {made.folder}"
    return _report(line, {**facts, "notes": made.notes}, arguments.json)


def export_with_card(
    path: Path,
    folder: Path,
    dtype: str | None = None,
    architecture: str | None = None,
    repo: str | None = None,
    license: str | None = None,
) -> "Exported":
    """Exports the checkpoint, or the newest undamaged one of a run, to the new folder `folder`, with its model card."""
    from ..checkpoint.store import checkpoint_at  # imports torch
    from ..interop.export import export_checkpoint
    from .model_card import CARD, model_card, read_training

    checkpoint = checkpoint_at(path)

    def card(made: "Exported", unfinished: Path) -> None:
        (unfinished / CARD).write_text(model_card(read_training(checkpoint), made, repo, license))

    with progress_bar("of the bytes read and written") as progress:
        return export_checkpoint(checkpoint, folder, dtype, architecture, progress=progress, finish=card)


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


def _report(line: str, facts: dict[str, Any], as_json: bool) -> int:
    print(json.dumps(facts) if as_json else line)
    for note in facts["notes"]:
        print(f"tokenyard: {note}", file=sys.stderr)
    return 0
