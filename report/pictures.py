"""Draws the main charts as PNGs from the data of the page. Needs matplotlib, an optional library."""

from base64 import b64decode
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0064a6", "#c04a00", "#00745a", "#a03f84", "#7a5c00", "#4b4b9a")
"""The colours of page/palette.js."""
SHADES = ("#083877", "#2070b4", "#5ba3cf", "#b5d4e9", "#eeeeee", "#fdc692", "#f4822f", "#c84a02", "#6b2303")
"""From an eighth of an even share to eight times that share, as in page/palette.js."""
PARTS = {
    "compute": "#0064a6",
    "data": "#7fb8e6",
    "evaluation": "#00745a",
    "checkpoint": "#8a6500",
    "startup": "#9a9a9a",
    "lost": "#b3261e",
}


def write_pictures(data: dict[str, Any], folder: Path) -> list[str]:
    """Writes loss, speed, time, load and layers if they have data. Returns the names. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    runs, written = data["runs"], []
    for name, draw, holds in (
        ("loss", draw_loss, any("loss" in run["series"] for run in runs)),
        ("speed", draw_speed, any("tokens_per_second" in run["series"] for run in runs)),
        ("time", draw_time, any(run["accounting"] for run in runs)),
        ("load", draw_load, runs[0]["telemetry"]),
        ("layers", draw_layers, runs[0]["telemetry"]),
    ):
        if holds:
            figure = Figure(figsize=(10, 5), dpi=120, layout="constrained")
            draw(figure, runs)
            figure.savefig(folder / f"{name}.png")
            written.append(f"{name}.png")
    return written


def draw_loss(figure: "Figure", runs: list[dict[str, Any]]) -> None:
    """Training loss thin and smoothed, validation loss dashed with dots, failures and alerts as vertical lines."""
    axes = figure.subplots()
    for run, colour in zip(runs, cycle(COLOURS), strict=False):
        draw_line(axes, run, "loss", f"{plain(run['name'])} training", colour)
        if found := run["series"].get("validation_loss"):
            axes.plot(found["x"], found["y"], "o--", color=colour, markersize=3, label=f"{plain(run['name'])} validation")
        for event in run["events"]:
            if event["trouble"] and event["step"] is not None:
                axes.axvline(event["step"], color="#b3261e", linewidth=0.8, linestyle=":")
    finish(axes, "Loss", "nats per token")


def draw_speed(figure: "Figure", runs: list[dict[str, Any]]) -> None:
    """Tokens per second above MFU."""
    upper, lower = figure.subplots(2, sharex=True)
    for run, colour in zip(runs, cycle(COLOURS), strict=False):
        draw_line(upper, run, "tokens_per_second", plain(run["name"]), colour)
        draw_line(lower, run, "mfu", plain(run["name"]), colour)
    for axes, title in ((upper, "Tokens per second"), (lower, "MFU")):
        axes.set_ylim(bottom=0)
        finish(axes, title, "")


def draw_time(figure: "Figure", runs: list[dict[str, Any]]) -> None:
    """A bar for each run, in seconds."""
    axes = figure.subplots()
    known = [run for run in runs if run["accounting"]]
    ends = np.zeros(len(known))
    for part in dict.fromkeys([*PARTS, *(part for run in known for part in run["accounting"]["seconds"])]):
        widths = np.array([run["accounting"]["seconds"].get(part, 0.0) for run in known])
        axes.barh(range(len(known)), widths, left=ends, color=PARTS.get(part, "#555555"), label=plain(part))
        ends = ends + widths
    axes.set_yticks(range(len(known)), [plain(run["name"]) for run in known])
    axes.set_xlabel("seconds")
    axes.set_title("Where the time went")
    axes.legend(ncols=6, fontsize="small")


def draw_load(figure: "Figure", runs: list[dict[str, Any]]) -> None:
    """The recent records of the first run: layers x experts."""
    found = runs[0]["telemetry"]
    first, last = found["recent"] or found["frames"][-1]
    load = decoded(found["load"])[-1]
    draw_ratios(
        figure, load, "expert", found["layers"], f"Load of the experts in steps {first} to {last}: {plain(runs[0]['name'])}"
    )


def draw_layers(figure: "Figure", runs: list[dict[str, Any]]) -> None:
    """The busiest expert of each layer over time."""
    found = runs[0]["telemetry"]
    table = np.array(found["by_layer"]["load_L"], dtype=float)
    ends = (found["frames"][0][0], found["frames"][-1][1])
    draw_ratios(figure, table, "step", found["layers"], f"Load of the busiest expert by layer: {plain(runs[0]['name'])}", ends)


def draw_ratios(
    figure: "Figure", table: np.ndarray, across: str, layers: list[int], title: str, ends: tuple[int, int] | None = None
) -> None:
    """Draws multiples of an even share on a logarithmic scale; experts without a token are black."""
    from matplotlib.colors import LinearSegmentedColormap

    axes = figure.subplots()
    with np.errstate(divide="ignore"):
        doublings = np.ma.masked_where(table == 0, np.log2(table))
    axes.set_facecolor("#111111")
    first, last = ends or (0, table.shape[1] - 1)
    half = 0.5 * (last - first) / max(1, table.shape[1] - 1) or 0.5
    picture = axes.imshow(
        doublings,
        cmap=LinearSegmentedColormap.from_list("load", SHADES),
        vmin=-3,
        vmax=3,
        aspect="auto",
        interpolation="nearest",
        extent=(first - half, last + half, len(layers) - 0.5, -0.5),
    )
    every = -(-len(layers) // 24)
    axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.set_xlabel(across)
    axes.set_ylabel("layer")
    axes.set_title(title)
    bar = figure.colorbar(picture, ticks=range(-3, 4))
    bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "even", "2 x", "4 x", "8 x"])


def draw_line(axes: "Axes", run: dict[str, Any], name: str, label: str, colour: str) -> None:
    """Draws a series; with many points, thin as logged and thick smoothed."""
    found = run["series"].get(name)
    if found is None:
        return
    smooth = "sx" in found
    axes.plot(found["x"], found["y"], color=colour, linewidth=0.7 if smooth else 1.6, alpha=0.35 if smooth else 1)
    axes.plot(found.get("sx", []), found.get("sy", []), color=colour, linewidth=1.6)
    axes.plot([], [], color=colour, label=label)


def finish(axes: "Axes", title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def plain(text: str) -> str:
    """Escapes what matplotlib reads as a formula, and leading underscores, which hide a name from the legend."""
    return text.replace("$", r"\$").lstrip("_") or "run"


def decoded(coded: dict[str, Any]) -> np.ndarray:
    """Returns the numbers of a quantized table of report/payload.py."""
    codes = np.frombuffer(b64decode(coded["codes"]), dtype=np.uint8).astype(float)
    values = coded["low"] + (codes - 1) / 253 * (coded["high"] - coded["low"])
    values = np.where(codes == 255, np.nan, np.where(codes == 0, 0.0, 2**values if coded["log"] else values))
    return values.reshape(coded["shape"])
