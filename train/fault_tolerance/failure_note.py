"""A rank that fails while the others wait for it: a note in the run folder ends them within seconds.

They may sit in a collective that their GPUs run, which nothing but the end of the process leaves. The watchdogs look for the note.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..config.redact import redact_plain

STACKS = "stacks"
"""The folder in the run folder for what ranks say when the job hangs or one of them fails."""
NOTE = f"{STACKS}/failed.json"


class Failure(NamedTuple):
    rank: int
    step: int
    """Optimizer steps done."""
    text: str
    code: int
    """With which all ranks end."""


def leave_note(folder: Path, failure: Failure) -> None:
    """For the other ranks of the run in `folder`, if that can be written and none is there."""
    note = folder / NOTE
    temporary = note.with_name(f"{note.name}.{failure.rank}.tmp")
    with suppress(OSError):
        note.parent.mkdir(exist_ok=True)
        if not note.exists():
            temporary.write_text(json.dumps(redact_plain(failure)))
            temporary.replace(note)


def find_note(folder: Path) -> Failure | None:
    """What a rank has left since `remove_note`."""
    with suppress(OSError, ValueError, TypeError):
        return Failure(*json.loads((folder / NOTE).read_text()))
    return None


def remove_note(folder: Path) -> None:
    """That of an earlier start; for rank 0, before the ranks meet."""
    (folder / NOTE).unlink(missing_ok=True)
