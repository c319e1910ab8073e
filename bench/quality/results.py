"""Results and picture of the runs: losses over the seeds, and a variant's share of the dense model's tokens, FLOPs and time."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...moe.param_count import count, training_flops_per_token
from ..timing import markdown
from .plan import DENSE, EXPERT_CHOICE, FP8, MUON, TARGETS, TUNED, QualityPlan, active, models
from .runs import Curve, Lab, crossing, deviation

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def results(lab: Lab, plan: QualityPlan, costs: dict[str, list[float]]) -> dict[str, Any]:
    """Results of the seeds whose runs are complete, as plain JSON.

    `shares`: the share of the dense model's tokens after which a variant reaches the final loss of the dense run of the same seed;
    None if it never does. It is read from the evaluations of full runs, whose learning rate is still high, so it is an upper bound.
    `decayed`: the same, interpolated between the final losses of the shorter and full runs of TUNED, each with its own decay.
    `muon`: both for MUON, with the runs of TUNED in the place of the dense ones.
    """
    found, shapes = {}, models(lab.size, lab.variants, lab.more)
    dense, tuned = _by_seed(lab, plan, DENSE), _by_seed(lab, plan, TUNED)
    flops = {name: training_flops_per_token(model, lab.size.sequence_length) for name, model in shapes.items()}
    for name, model in shapes.items():
        curves = {seed: curve for seed, curve in _by_seed(lab, plan, name).items() if seed in dense}
        if curves:
            parts = count(model)
            found[name] = {
                "rate": plan.rate(name),
                "active": active(model),
                "total": active(model) + parts.total - parts.active,
                "flops": flops[name] / flops[DENSE],
                "cost": statistics.median(costs[name]) if name in costs else None,
                "costs": costs.get(name, []),
                **_losses([curve.losses[-1] for curve in curves.values()]),
                "below_dense": [dense[seed].losses[-1] - curve.losses[-1] for seed, curve in curves.items()],
                "above_tuned": [curve.losses[-1] - tuned[seed].losses[-1] for seed, curve in curves.items() if seed in tuned],
                "imbalance": statistics.fmean([curve.imbalance for curve in curves.values()]),
                "dropped": statistics.fmean([curve.dropped for curve in curves.values()]),
                "shares": [_share(curve.tokens, curve.losses, dense[seed]) for seed, curve in curves.items()],
            }
    of = {name: dict(zip(("shorter", "decayed"), _shorter(lab, plan, name), strict=True)) for name in TARGETS if name in shapes}
    return {"steps": plan.steps, "tried": plan.tried, "variants": found, **of[TUNED], "muon": of.get(MUON)}


def _by_seed(lab: Lab, plan: QualityPlan, variant: str) -> dict[int, Curve]:
    runs = {seed: lab.curves([plan.full(variant, seed)]) for seed in range(1, plan.seeds + 1)}
    return {seed: found[0] for seed, found in runs.items() if found}


def _losses(losses: list[float]) -> dict[str, Any]:
    return {"losses": losses, "mean": statistics.fmean(losses), "deviation": deviation(losses)}


def _share(tokens: Sequence[float], losses: Sequence[float], dense: Curve) -> float | None:
    reached = crossing(tokens, losses, dense.losses[-1])
    return None if reached is None else reached / dense.tokens[-1]


def _shorter(lab: Lab, plan: QualityPlan, name: str) -> tuple[dict[str, Any], list[float | None]]:
    """Returns the losses for each length, and the share of the target's tokens for each seed with more than one length."""
    by_length: dict[str, list[float]] = {}
    shares: list[float | None] = []
    for seed, other in _by_seed(lab, plan, TARGETS[name]).items():
        lengths = [length for length in (*sorted(plan.shorter), 1.0) if lab.curves([plan.short(name, length, seed)])]
        ends = [lab.curve(plan.short(name, length, seed)) for length in lengths]
        for length, curve in zip(lengths, ends, strict=True):
            by_length.setdefault(f"{length:g}", []).append(curve.losses[-1])
        if len(ends) > 1:
            shares.append(_share([curve.tokens[-1] for curve in ends], [curve.losses[-1] for curve in ends], other))
    return {length: _losses(losses) for length, losses in sorted(by_length.items())}, shares


HEAD = "variant | rate | active | total | loss | below dense | imbalance | dropped | FLOPs | time | tokens | of FLOPs | of time"


def table(found: dict[str, Any]) -> str:
    """Returns a Markdown table.

    tokens, of FLOPs, of time: what a variant needs for the dense model's final loss, relative to that model.
    """
    lines = [markdown(HEAD.split(" | "), (_row(name, entry) for name, entry in found["variants"].items()))]
    lines += [
        f"{name} minus {TUNED}, seed by seed: {_spread(entry['above_tuned'])}"
        for name, entry in found["variants"].items()
        if name in FP8 and entry["above_tuned"]
    ]
    shorter = (f"{length} of them {_spread(entry['losses'])}" for length, entry in found["shorter"].items())
    lines += ["", f"{TUNED} by its share of the tokens: {', '.join(shorter)}"]
    if found["causal"]:
        lines += [f"{EXPERT_CHOICE}, tokens choosing their experts: {_spread(found['causal'])}"]
    lines += [f"Share of the tokens at which it has the dense model's final loss, decayed: {_shares(found['decayed'], 1.0)}"]
    if found["muon"]:
        ends = (f"{length} of them {_spread(entry['losses'])}" for length, entry in found["muon"]["shorter"].items())
        lines += [f"{MUON} by its share of the tokens: {', '.join(ends)}"]
        lines += [
            f"Share of the tokens at which it has the final loss of {TUNED}, decayed: {_shares(found['muon']['decayed'], 1.0)}"
        ]
    return "\n".join(lines)


def _row(name: str, entry: dict[str, Any]) -> list[str]:
    cost = entry["cost"]
    return [
        name,
        f"{entry['rate']:g}",
        f"{entry['active']:,}",
        f"{entry['total']:,}",
        _spread(entry["losses"]),
        _spread(entry["below_dense"]),
        f"{entry['imbalance']:.2f}" if entry["imbalance"] else "",
        f"{entry['dropped']:.1%}",
        f"{entry['flops']:.3f}",
        f"{cost:.2f}" if cost else "",
        _shares(entry["shares"], 1.0),
        _shares(entry["shares"], entry["flops"]),
        _shares(entry["shares"], cost) if cost else "",
    ]


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.4f} +- {deviation(values):.4f} ({len(values)})"


def _shares(shares: list[float | None], factor: float) -> str:
    """Returns the mean and deviation, or the number of seeds that never reach the loss."""
    there = [share * factor for share in shares if share is not None]
    missing = len(shares) - len(there)
    if missing or not there:
        return f"never ({missing} of {len(shares)})"
    return f"{statistics.fmean(there):.2f} +- {deviation(there):.2f}"


# The picture: the curves against tokens, FLOPs and time, and the final losses. Needs matplotlib.

COLOURS = (
    *("#222222", "#7a5c00", "#0064a6", "#00745a", "#c04a00", "#a03f84", "#6f9fd8", "#999933", "#5b3a8c", "#b3204d", "#2f4f2f"),
    *("#8a8a00", "#d08a6a", "#4aa08a"),
)
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
