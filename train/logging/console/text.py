"""Lines of styled text that print plainly anywhere and in colour on a terminal; and how numbers are written on them."""

import math
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple, TextIO

from ...config.complain import printable
from ...config.redact import redact


class Span(NamedTuple):
    """Text with a rich style; the style is left out where there is no terminal."""

    text: str
    style: str = ""


Line = list[Span]

ASCII_BARS = "_.:-=+*#@"
BLOCKS = "_\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
"""Characters of bar charts, from none to full: lower blocks of one to eight eighths."""


class Printer:
    """Writes lines to `stream`: through rich if that is a terminal, else as they are, flushed line by line."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._rich = _rich_console(self._stream) if self._stream.isatty() else None
        self._encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self.bars = BLOCKS if self._writable(BLOCKS) == BLOCKS else ASCII_BARS

    @property
    def width(self) -> int | None:
        """Characters of a line of the terminal as it is now; None where there is none."""
        return None if self._rich is None else self._rich.width

    def line(self, line: Line) -> None:
        """One line, never wrapped or cropped by us."""
        line = [Span(self._writable(printable(redact(text))), style) for text, style in line]
        if self._rich is None:
            self._stream.write(plain(line) + "\n")
            self._stream.flush()
            return
        from rich.text import Text

        self._rich.print(Text.assemble(*line))

    def lines(self, lines: Iterable[Line]) -> None:
        for line in lines:
            self.line(line)

    def say(self, text: str) -> None:
        """One line of unstyled text."""
        self.line([Span(text)])

    def _writable(self, text: str) -> str:
        """`text` with escapes for what the stream's encoding has no character for."""
        return text.encode(self._encoding, "backslashreplace").decode(self._encoding)


def plain(line: Line) -> str:
    """The line without styles and without blanks at its end."""
    return "".join(span.text for span in line).rstrip()


def rows(items: Iterable[tuple[str, str]]) -> list[Line]:
    """Names and values in two columns; an empty name goes on with the row above."""
    return [[Span(f"  {name:<12}", "cyan"), Span(value)] for name, value in items]


def title(text: str) -> Line:
    return [Span(text, "bold")]


def commands(items: Iterable[tuple[str, str]]) -> list[Line]:
    """What a command is for, and below it the command, alone on its line to be copied."""
    return [line for purpose, command in items for line in ([Span(f"  {purpose}")], [Span("    "), Span(command, "bold green")])]


def duration(seconds: float | None) -> str:
    """Two units at most, in 6 characters: 45s, 3m12s, 2h05m, 11d04h; '-' if unknown."""
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
    """A character a value, from marks[0] (zero) to marks[-1] (`full` and above); any value over 0 shows at least marks[1]."""
    top = len(marks) - 1
    return "".join(marks[0 if value <= 0 else min(top, max(1, round(value / full * top)))] for value in values)


def _rich_console(stream: TextIO) -> Any:
    from rich.console import Console

    return Console(file=stream, highlight=False, soft_wrap=True)
