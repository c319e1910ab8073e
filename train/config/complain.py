"""What is said on standard error: without secrets, and with nothing in it that steers a terminal. No torch here."""

import re
import sys

from .redact import redact

BAD_USAGE = 2
"""The exit code for what cannot be used as it is."""
LONGEST = 1000
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but newline and tab, line separators, changes of the writing direction, halves of characters."""


def complain(error: Exception | str, code: int = BAD_USAGE) -> int:
    """Says it in one line. Returns the exit code."""
    print(f"tokenyard: {one_line(str(error))}", file=sys.stderr)
    return code


def say(text: str) -> None:
    """On standard error, at once: `text`, of whatever length, without secrets and what a terminal would obey."""
    print(f"tokenyard: {printable(redact(text))}", file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """`text` without secrets, line breaks and what a terminal would obey; of a very long one the beginning."""
    line = printable(" ".join(redact(text).split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def printable(text: str) -> str:
    """`text` with control characters escaped: what somebody else has named or written may steer a terminal."""
    return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)
