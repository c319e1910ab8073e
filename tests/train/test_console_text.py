"""Numbers, durations, bars and foreign text as the console writes them."""

import io
import math

import pytest
from tokenyard.train.config.number_format import flops, short
from tokenyard.train.logging.console.text import ASCII_BARS, Printer, bar, duration, printable


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (12345.6, "12,346"),
        (999_499, "999,499"),
        (999_600, "1.00M"),
        (9_996_000, "10.0M"),
        (46_702_792_704, "46.7B"),
    ],
)
def test_short(number: float, text: str):
    assert short(number) == text


def test_flops():
    assert [flops(value) for value in (12.0, 9_999_000.0, 198.3e9, 989.5e12, 2.25e18)] == [
        "12 FLOP",
        "10.0 MFLOP",
        "198 GFLOP",
        "990 TFLOP",
        "2.25 EFLOP",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (math.inf, "-"),
        (-1, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (192, "3m12s"),
        (7500, "2h05m"),
        (964_800, "11d04h"),
    ],
)
def test_duration(seconds: float | None, text: str):
    assert duration(seconds) == text


def test_bar():
    assert bar([0.0, 0.001, 0.5, 1.0, 1.5, 2.0, 9.0], 2.0, ASCII_BARS) == "_.:=*@@"


def test_printable_keeps_text_and_disarms_the_rest():
    assert printable("a\tb\n\u00e9\u4f60\U0001f600") == "a\tb\n\u00e9\u4f60\U0001f600"
    assert printable("\x1b]0;x\x07\r\x9b\u202e\ud800") == "\\x1b]0;x\\x07\\r\\x9b\\u202e\\ud800"


def test_a_line_steers_no_terminal():
    stream = io.StringIO()
    Printer(stream).say("a run called \x1b[2J\x07, and a tab\t.")
    assert stream.getvalue() == "a run called \\x1b[2J\\x07, and a tab\t.\n"
