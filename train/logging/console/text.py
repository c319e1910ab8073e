"""Lines of styled text, printed in colour on a terminal and plainly elsewhere, and the formatting of durations and bars."""

import math
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TextIO

from ...config.complain import go_silent, printable
from ...config.redact import redact


class Span(NamedTuple):
    """Text with a rich style, which is ignored without a terminal."""

    text: str
    style: str = ""


Line = list[Span]

COMMAND = "bold green"
"""The style of a command that the reader may copy."""

ASCII_BARS = "_.:-=+*#@"
BLOCKS = "_\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
"""Characters of bar charts, from none to full: lower blocks of one to eight eighths."""


class Printer:
    """Writes lines to `stream`: with rich if that is a terminal, otherwise as plain text, flushed line by line."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self.copy: Callable[[str], None] = lambda text: None
        """Gets each line, as plain text."""
        self._rich: Any = None
        if self._stream.isatty():
            from rich.console import Console

            self._rich = Console(file=self._stream, highlight=False, soft_wrap=True)
        self._encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self.bars = BLOCKS if self._clean(BLOCKS) == BLOCKS else ASCII_BARS

    @property
    def width(self) -> int | None:
        """The current width of the terminal in characters; None without a terminal."""
        return None if self._rich is None else self._rich.width

    def line(self, line: Line) -> None:
        """Prints a line and crops nothing. A terminal gets what is too wide for it in several lines, parted at blanks."""
        text = self._clean(plain(line))
        self.copy(text)
        if self._rich is None:
            try:
                self._stream.write(text + "\n")
                self._stream.flush()
            except BrokenPipeError:  # the run goes on without a console
                go_silent(self._stream)
            return
        from rich.text import Text

        for part in folded([Span(self._clean(text), style) for text, style in line], self._rich.width):
            self._rich.print(Text.assemble(*part))

    def lines(self, lines: Iterable[Line]) -> None:
        for line in lines:
            self.line(line)

    def say(self, text: str) -> None:
        """Prints a line of unstyled text."""
        self.line([Span(text)])

    def _clean(self, text: str) -> str:
        """Returns `text` without secrets, with escapes for control characters and for what the stream's encoding lacks."""
        return printable(redact(text)).encode(self._encoding, "backslashreplace").decode(self._encoding)


def plain(line: Line) -> str:
    """Returns the line without styles and without trailing blanks."""
    return "".join(span.text for span in line).rstrip()


def folded(line: Line, width: int) -> list[Line]:
    """Returns a line as lines of at most `width` characters, parted at blanks of its last span and indented below that.

    A command stays as it is, to be copied, and so does a word that is longer.
    """
    *before, last = line or [Span("")]
    used = sum(len(span.text) for span in before)
    if used + len(last.text) <= width or last.style == COMMAND or used > width // 2:
        return [[*line]]
    indent = "" if before else "  "
    found = textwrap.wrap(last.text, width - used, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    first, *more = found or [""]
    return [[*before, Span(first, last.style)], *([Span(" " * used), Span(text, last.style)] for text in more)]


def rows(items: Iterable[tuple[str, str]]) -> list[Line]:
    """Returns names and values in two columns; an empty name continues the row above."""
    return [[Span(f"  {name:<12}", "cyan"), Span(value)] for name, value in items]


def title(text: str) -> Line:
    return [Span(text, "bold")]


def commands(items: Iterable[tuple[str, str]]) -> list[Line]:
    """Returns the purpose of each command and, on a line of its own to be copied, the command."""
    return [line for purpose, command in items for line in ([Span(f"  {purpose}")], [Span("    "), Span(command, COMMAND)])]


def duration(seconds: float | None) -> str:
    """Formats a duration in 6 characters, with two units at most: 45s, 3m12s, 2h05m, 11d04h; '-' if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def bar(values: Iterable[float], full: float, marks: str) -> str:
    """Returns a character for each value, from marks[0] (zero) to marks[-1] (`full` and above), at least marks[1] if not zero."""
    top = len(marks) - 1
    return "".join(marks[0 if value <= 0 else min(top, max(1, round(value / full * top)))] for value in values)
