"""Draws predicted against published speed. Needs matplotlib, an optional library."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .accuracy import Compared

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "deepseek_v3": "#0064a6",
    "gpt_oss_120b": "#c04a00",
    "qwen3_235b_a22b": "#00745a",
    "qwen3_30b_a3b": "#a03f84",
    "mixtral_8x7b": "#7a5c00",
    "moonlight_16b_a3b": "#4b4b9a",
    "qwen3_next_80b_a3b": "#b3261e",
}
"""Of the report's palette."""
EDGES = [-0.5 + 0.1 * step for step in range(12)]


def draw(compared: Sequence[Compared], path: Path) -> None:
    """Writes an SVG. Raises ImportError without matplotlib."""
    write_charts(path, 6.2, partial(_speeds, compared=compared), partial(_errors, compared=compared))


def write_charts(path: Path, height: float, left: "Callable[[Axes], None]", right: "Callable[[Axes], None]") -> None:
    """Writes an SVG, `height` inches high, of a wide chart and one beside it, with the same bytes each time."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "tokenyard", "svg.fonttype": "none", "font.size": 11}):
        figure = Figure(figsize=(13, height), layout="constrained")
        for draw_chart, axes in zip((left, right), figure.subplots(1, 2, width_ratios=(3, 2)), strict=True):
            draw_chart(axes)
        figure.savefig(path, metadata={"Date": None})


def _speeds(axes: "Axes", compared: Sequence[Compared]) -> None:
    """Each row is a point: filled if the fit has not seen it, a square if no vendor tuned it."""
    for name, colour in COLOURS.items():
        for half in (True, False):
            for tuned, marker in ((True, "o"), (False, "s")):
                of = [one for one in compared if (one.row.family, one.row.open, one.row.vendor) == (name, half, tuned)]
                axes.plot(
                    [1e6 / one.row.microseconds_a_token for one in of],
                    [one.predicted.tokens_per_second_per_gpu for one in of],
                    marker,
                    color=colour,
                    fillstyle="none" if half else "full",
                    alpha=0.8,
                    markersize=6,
                )
        axes.plot([], [], "o", color=colour, label=name)
    axes.plot([], [], "o", color="#555555", label="held out, tuned by a vendor")
    axes.plot([], [], "o", color="#555555", fillstyle="none", label="seen by the fit")
    axes.plot([], [], "s", color="#555555", label="held out, of others")
    ends = [300.0, 60000.0]
    predicted = next(one.predicted for one in compared if one.row.vendor)
    slow, fast = predicted.likely / predicted.high, predicted.likely / predicted.low
    axes.plot(ends, ends, color="#222222", linewidth=1)
    axes.fill_between(ends, [end * slow for end in ends], [end * fast for end in ends], color="#999999", alpha=0.2, linewidth=0)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    axes.set(
        xlabel="published tokens a second of a GPU", ylabel="predicted", title="The band is the range for rows that a vendor tuned"
    )
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9, loc="upper left")


def _errors(axes: "Axes", compared: Sequence[Compared]) -> None:
    """How many vendor-tuned rows have which error, in both halves."""
    halves = [[one.error for one in compared if one.row.vendor and one.row.open is half] for half in (False, True)]
    axes.hist(halves, EDGES, color=["#0064a6", "#b5d4e9"], label=["held out", "seen by the fit"])
    axes.axvline(0, color="#222222", linewidth=1)
    axes.set(xlabel="predicted over measured seconds, less 1", ylabel="rows", title="Errors of rows that a vendor tuned")
    axes.set_yticks(range(0, 21, 5))
    axes.grid(alpha=0.25, axis="y")
    axes.legend()
