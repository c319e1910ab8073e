"""Results of the runs: losses over the seeds, and the share of the dense model's tokens, FLOPs and time that a variant needs."""

import statistics
from collections.abc import Sequence
from typing import Any

from ...moe.param_count import count, training_flops_per_token
from ..timing import markdown
from .plan import DENSE, EXPERT_CHOICE, TUNED, QualityPlan, active, models
from .runs import Curve, Lab, crossing, deviation


def results(lab: Lab, plan: QualityPlan, costs: dict[str, list[float]]) -> dict[str, Any]:
    """Results of the seeds whose runs are complete, as plain JSON.

    `shares`: the share of the dense model's tokens after which a variant reaches the final loss of the dense run of the same seed;
    None if it never does. It is read from the evaluations of full runs, whose learning rate is still high, so it is an upper bound.
    `decayed`: the same, interpolated between the final losses of the shorter and full runs of TUNED, each with its own decay.
    """
    found, shapes = {}, models(lab.size, lab.variants, lab.more)
    dense = _by_seed(lab, plan, DENSE)
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
                "imbalance": statistics.fmean([curve.imbalance for curve in curves.values()]),
                "dropped": statistics.fmean([curve.dropped for curve in curves.values()]),
                "shares": [_share(curve.tokens, curve.losses, dense[seed]) for seed, curve in curves.items()],
            }
    shorter, decayed = _shorter(lab, plan, dense)
    return {"steps": plan.steps, "tried": plan.tried, "variants": found, "shorter": shorter, "decayed": decayed}


def _by_seed(lab: Lab, plan: QualityPlan, variant: str) -> dict[int, Curve]:
    runs = {seed: lab.curves([plan.full(variant, seed)]) for seed in range(1, plan.seeds + 1)}
    return {seed: found[0] for seed, found in runs.items() if found}


def _losses(losses: list[float]) -> dict[str, Any]:
    return {"losses": losses, "mean": statistics.fmean(losses), "deviation": deviation(losses)}


def _share(tokens: Sequence[float], losses: Sequence[float], dense: Curve) -> float | None:
    reached = crossing(tokens, losses, dense.losses[-1])
    return None if reached is None else reached / dense.tokens[-1]


def _shorter(lab: Lab, plan: QualityPlan, dense: dict[int, Curve]) -> tuple[dict[str, Any], list[float | None]]:
    """Returns the losses for each length, and the share of the dense model's tokens for each seed with more than one length."""
    by_length: dict[str, list[float]] = {}
    shares: list[float | None] = []
    for seed, other in dense.items():
        lengths = [length for length in (*sorted(plan.shorter), 1.0) if lab.curves([plan.short(length, seed)])]
        ends = [lab.curve(plan.short(length, seed)) for length in lengths]
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
    shorter = (f"{length} of them {_spread(entry['losses'])}" for length, entry in found["shorter"].items())
    lines += ["", f"{TUNED} by its share of the tokens: {', '.join(shorter)}"]
    if found["causal"]:
        lines += [f"{EXPERT_CHOICE}, tokens choosing their experts: {_spread(found['causal'])}"]
    lines += [f"Share of the tokens at which it has the dense model's final loss, decayed: {_shares(found['decayed'], 1.0)}"]
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
