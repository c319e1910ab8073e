"""`tokenyard plan goal=loss flops=1e21`: the model size, tokens and experts that published scaling laws call compute-optimal."""

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from ..plan.scaling_laws import (
    ACTIVATED,
    FINEST,
    LAWS,
    LEVERAGE_FITTED,
    MIXTURES,
    STEP_FITS,
    Law,
    Point,
    StepFit,
    leverage,
)
from ..train.config.compose import CONF
from ..train.config.config import ConfigError
from ..train.config.model_summary import Count, count
from ..train.config.number_format import short
from ..train.config.serialize import config_from_plain
from .words import positive_number, split_words

OWN = ("goal", "flops", "active", "tokens")
NEAREST = 3
"""Presets that are named."""
COLUMNS = f"{'law':18} {'experts':20}{'FLOPs':>9}{'active':>8}{'total':>8}{'tokens':>8}{'each':>6}{'loss':>7}  extrapolated"
LEGEND = (
    "experts: those that a token uses; E: expert weights over those that a token uses; each: tokens of an active parameter",
    "active counts embedding and head for Hoffmann, Besiroglu and Ludziejewski alone",
    "loss: each law's own data and tokenizer, so only losses of one paper compare",
)


class LawAnswer(NamedTuple):
    law: Law
    point: Point

    @property
    def beyond(self) -> dict[str, float]:
        return self.law.fitted.beyond(self.point)


def loss_command(arguments: Namespace) -> None:
    """Prints the tables, or one object. Raises ConfigError."""
    if arguments.explain or arguments.write:
        option = "--explain" if arguments.explain else "--write"
        raise ConfigError(f"{option}: goal=loss finds no layout; nearest valid: goal=loss flops=1e21")
    given = read_budget(arguments.words)
    answers = [LawAnswer(law, point) for law in LAWS if (point := answer(law, **given)) is not None]
    chosen = reference(answers)
    presets = nearest_presets(chosen.point.active)
    print(json.dumps(as_json(given, answers, chosen, presets)) if arguments.json else "\n".join(lines(answers, chosen, presets)))


def read_budget(words: list[str]) -> dict[str, float]:
    """Returns one or two of flops, active and tokens. Raises ConfigError."""
    own, rest = split_words(words, OWN)
    if rest:
        key = rest[0].partition("=")[0]
        rule = "goal=loss searches the model itself and takes flops, active and tokens alone"
        raise ConfigError(f"{key}: {rule}; nearest valid: goal=loss flops=1e21")
    given = {key: positive_number(key, own[key], "1e21" if key == "flops" else "1e9") for key in OWN[1:] if key in own}
    if not given:
        raise ConfigError("flops: says how much is computed; nearest valid: goal=loss flops=1e21")
    if len(given) == 3:
        flops = 6 * given["active"] * given["tokens"]
        rule = "follows from active and tokens: give two of the three"
        raise ConfigError.of("flops", own["flops"], rule, f"goal=loss flops={flops:.3g} active={own['active']}")
    return given


def answer(law: Law, flops: float | None = None, active: float | None = None, tokens: float | None = None) -> Point | None:
    """Returns what the law says of one or two of these; with one, all others are optimal."""
    if active is not None and tokens is not None:
        return law.best(6 * active * tokens, active=active)
    if flops is not None:
        return law.best(flops, active, tokens)
    if active is not None:
        return law.best(law.budget_for(lambda point: point.active, active))
    assert tokens is not None
    return law.best(law.budget_for(lambda point: point.tokens, tokens))


def reference(answers: list[LawAnswer]) -> LawAnswer:
    """Returns the answer for the learning rate, batch and presets: of mixtures of known size the least extrapolated."""
    mixtures = [each for each in answers if each.law in MIXTURES and each.point.total is not None]
    return min(mixtures, key=lambda each: max(each.beyond.values(), default=1.0))


def lines(answers: list[LawAnswer], chosen: LawAnswer, presets: dict[str, int]) -> list[str]:
    """Returns the tables for people."""
    point = chosen.point
    papers = dict.fromkeys(each.law.source.partition(",")[0] for each in answers)
    shares = "   ".join(f"{share:.1%}: {leverage(share, FINEST, point.flops):.1f}x" for share in ACTIVATED)
    beyond = _words(LEVERAGE_FITTED.beyond(point))
    grains = [
        f"4 x width / {each.point.granularity} ({each.law.name}, {each.law.experts})" for each in answers if each.point.granularity
    ]
    near = ", ".join(f"model={name} ({short(active)})" for name, active in presets.items())
    return [
        "compute-optimal by published scaling laws; the FLOPs of a run are 6 x active parameters x tokens",
        *("", COLUMNS, *map(_row, answers), "", *LEGEND, f"papers: {', '.join(papers)}"),
        *(
            "",
            f"sparsity: share of the experts that a token uses, and the FLOPs of a dense model as good as one of {point.flops:.3g}",
        ),
        f"  {shares}   (Tian 2025; extrapolated: {beyond})",
        "  sparser is better down to the sparsest that was trained, 0.8%; it costs memory",
        f"granularity: columns of an expert of 2 x width / {FINEST:.0f} at any budget (Tian 2025, trained up to 16)",
        *(f"  {each}" for each in grains),
        *("", f"AdamW for {short(point.active)} active, {short(point.tokens)} tokens: {chosen.law.name}, {chosen.law.experts}"),
        f"  {'fit':24}{'peak lr':>9}{'tokens a step':>15}  extrapolated",
        *(_step_row(fit, point) for fit in STEP_FITS),
        *("", f"presets of about {short(point.active)} active: {near}"),
    ]


def _row(each: LawAnswer) -> str:
    law, point = each
    total = "-" if point.total is None else short(point.total)
    loss = "-" if point.loss is None else f"{point.loss:.3f}"
    experts = law.experts + (f", granularity {point.granularity}" if point.granularity else "")
    sizes = f"{point.flops:>9.2e}{short(point.active):>8}{total:>8}{short(point.tokens):>8}{point.tokens / point.active:>6.0f}"
    return f"{law.name:18} {experts:20}{sizes}{loss:>7}  {_words(each.beyond)}"


def _step_row(fit: StepFit, point: Point) -> str:
    row = f"  {fit.name:24}{fit.lr(point):>9.2e}{short(fit.batch(point)):>15}  {_words(fit.fitted.beyond(point))}"
    return f"{row} ({fit.experts}; {fit.source})"


def _words(beyond: dict[str, float]) -> str:
    """Returns by which factors a fit is extrapolated."""
    return (
        ", ".join(f"{name} {factor:.2g}x" if factor < 99.5 else f"{name} {factor:,.0f}x" for name, factor in beyond.items()) or "no"
    )


def as_json(given: dict[str, float], answers: list[LawAnswer], chosen: LawAnswer, presets: dict[str, int]) -> dict[str, Any]:
    """Returns everything as plain values: parameters, tokens, FLOPs, and factors by which fits are extrapolated."""
    point = chosen.point
    return {
        "given": given,
        "laws": [
            {
                "law": each.law.name,
                "source": each.law.source,
                "experts": each.law.experts,
                "counts_embeddings": each.law.embeddings,
                **each.point._asdict(),
                "extrapolated": each.beyond,
            }
            for each in answers
        ],
        "leverage": {f"{share:g}": leverage(share, FINEST, point.flops) for share in ACTIVATED},
        "leverage_extrapolated": LEVERAGE_FITTED.beyond(point),
        "leverage_granularity": FINEST,
        "adamw": [
            {
                "fit": fit.name,
                "source": fit.source,
                "for": chosen.law.name,
                "lr": fit.lr(point),
                "batch_tokens": fit.batch(point),
                "extrapolated": fit.fitted.beyond(point),
            }
            for fit in STEP_FITS
        ],
        "presets": presets,
    }


def nearest_presets(active: float) -> dict[str, int]:
    """Returns the active parameters of the models of conf/model with experts that are nearest in size, tiny ones left out.

    The files are read without Hydra, which takes half a second for each.
    """
    found = dict[str, Count]()
    for path in sorted((CONF / "model").glob("*.yaml")):
        if not path.stem.startswith("tiny"):
            found[path.stem] = count(config_from_plain({"model": _preset(path)}).model)
    mixtures = {name: parts.active for name, parts in found.items() if parts.experts}
    names = sorted(mixtures, key=lambda name: abs(math.log(mixtures[name] / active)))[:NEAREST]
    return {name: mixtures[name] for name in names}


def _preset(path: Path) -> dict[str, Any]:
    """Returns a preset with those that its `defaults` name below it."""
    import yaml

    own: dict[str, Any] = yaml.safe_load(path.read_text())
    plain = dict[str, Any]()
    for name in own.pop("defaults", []):
        if name != "_self_":
            plain = _merged(plain, _preset(path.with_name(f"{name}.yaml")))
    return _merged(plain, own)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
