"""Draws the curves against tokens, FLOPs and time, and the final losses. Needs matplotlib."""

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plan import DENSE, TUNED, QualityPlan
from .runs import Lab

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#222222", "#7a5c00", "#0064a6", "#00745a", "#c04a00", "#a03f84", "#6f9fd8")
"""The dense model is black."""


def draw(lab: Lab, plan: QualityPlan, found: dict[str, Any], path: Path) -> None:
    """Writes a PNG. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    variants = found["variants"]
    colours: dict[str, str] = dict(zip(variants, COLOURS, strict=False))
    dense = variants[DENSE]["mean"]
    flops = {name: entry["flops"] for name, entry in variants.items()}
    costs = {name: entry["cost"] or float("nan") for name, entry in variants.items()}
    panels = (("tokens", dict.fromkeys(variants, 1.0)), ("FLOPs", flops), ("time", costs))
    for axis, (title, factors) in zip(axes, panels, strict=False):
        for name in variants:
            _curve(axis, lab, plan, name, factors[name], colours[name])
        ends = [(float(share) * factors[TUNED], entry["mean"]) for share, entry in found["shorter"].items()]
        axis.plot(*zip(*ends, strict=True), "D--", color=colours[TUNED], markersize=7, linewidth=1, zorder=5)
        axis.axhline(dense, color=COLOURS[0], linestyle=":", linewidth=1)
        axis.axvline(1.0, color="#999999", linestyle=":", linewidth=1)
        axis.set(xlabel=f"{title}, as a share of the dense run's", ylabel="validation loss, nats a token", title=f"Against {title}")
        axis.set_ylim(min(entry["mean"] for entry in variants.values()) - 0.03, dense + 0.6)
        axis.grid(alpha=0.25)
    axes[0].plot([], [], "D--", color=colours[TUNED], label=f"{TUNED}, each decayed")
    axes[0].legend(loc="lower left")
    _ends(axes[3], variants, colours, dense)
    figure.savefig(path)
    print(f"quality: {path}")


def _curve(axis: "Axes", lab: Lab, plan: QualityPlan, name: str, factor: float, colour: str) -> None:
    """The mean over the seeds, with a band from the lowest to the highest."""
    curves = lab.curves([plan.full(name, seed) for seed in range(1, plan.seeds + 1)])
    whole = curves[0].tokens[-1]
    at = [tokens / whole * factor for tokens in curves[0].tokens]
    columns = list(zip(*(curve.losses for curve in curves), strict=True))
    means = [statistics.fmean(column) for column in columns]
    axis.plot(at, means, color=colour, label=name, linewidth=2.2 if name == DENSE else 1.5)
    axis.fill_between(at, [min(column) for column in columns], [max(column) for column in columns], color=colour, alpha=0.12)


def _ends(axis: "Axes", variants: dict[str, Any], colours: dict[str, str], dense: float) -> None:
    """The final loss of each seed."""
    for place, (name, entry) in enumerate(variants.items()):
        axis.plot([place] * len(entry["losses"]), entry["losses"], "o", color=colours[name], alpha=0.7)
        axis.plot([place - 0.25, place + 0.25], [entry["mean"]] * 2, color=colours[name], linewidth=2)
    axis.axhline(dense, color=COLOURS[0], linestyle=":", linewidth=1)
    axis.set_xticks(range(len(variants)), list(variants), rotation=20)
    axis.set(ylabel="validation loss, nats a token", title="After the same tokens: each seed, and the mean")
    axis.grid(alpha=0.25, axis="y")
