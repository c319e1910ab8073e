"""Messages on standard error, without secrets and without control characters that a terminal would obey. Imports no torch."""

import os
import re
import sys
from typing import TextIO

from .redact import redact

BAD_USAGE = 2
"""The exit code for a wrong configuration, command line or file."""
LONGEST = 1000
"""Characters of a line; the rest is cut off."""
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except newline and tab, line separators, changes of the writing direction, surrogates."""


def complain(error: Exception | str, code: int = BAD_USAGE) -> int:
    """Prints an error in one line. Returns the exit code."""
    print(f"tokenyard: {one_line(str(error))}", file=sys.stderr)
    return code


def say(text: str) -> None:
    """Prints text of any length to standard error and flushes."""
    print(f"tokenyard: {printable(redact(text))}", file=sys.stderr, flush=True)


def go_silent(stream: TextIO) -> None:
    """Lets `stream`, which nobody reads any more, write to nowhere, also what Python still holds of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def one_line(text: str) -> str:
    """Returns `text` as one printable line without secrets, cut off after LONGEST characters."""
    line = printable(" ".join(redact(text).split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def printable(text: str) -> str:
    """Returns `text` with control characters escaped, since names and texts of others could control the terminal."""
    return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)
