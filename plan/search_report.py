"""What the planner found, for people and as one JSON object: the best layouts, those refused, and one layout broken down."""

from dataclasses import asdict, fields
from typing import Any, NamedTuple

from ..train.config.gpus import Gpu
from .candidates import Candidate
from .search import Found, RankedLayout, Refused
from .step_time import Terms
from .workload import Workload

DEGREES = {"tensor": "tensor", "context": "context", "expert": "expert", "expert_tensor": "exp-t", "shard": "shard", "zero": "zero"}
COLUMNS = (
    f" #{'GPUs':>6}{''.join(f'{name:>8}' for name in DEGREES.values())} {'pipeline':15}{'exchange':13}{'recompute':10}{'micro':>8}"
)
NUMBERS = f"{'step s':>9}{'range':>16}{'MFU':>7}{'tokens/s/GPU':>14}{'memory':>11}  verdict"
PLACES = 8
"""Kinds of refused layouts that are shown."""
LINKS = ("exchange", "tensor", "context", "messages", "gathers", "gradients")


class PlannedRun(NamedTuple):
    """What is trained: tokens of the run and of a step."""

    tokens: float
    per_step: int
    gpu: Gpu


class Bill(NamedTuple):
    """Days and US dollars of a run, each as (low, likely, high)."""

    days: tuple[float, float, float]
    dollars: tuple[float, float, float] | None
    """None: nobody publishes a price."""


def bill(planned: RankedLayout, run: PlannedRun) -> Bill:
    """Returns what the whole run takes. The ends of the range of money are those of time and of price together."""
    steps, price = run.tokens / run.per_step, run.gpu.price
    low, likely, high = (steps * each for each in (planned.time.low, planned.time.likely, planned.time.high))
    days = low / 86400, likely / 86400, high / 86400
    if price is None:
        return Bill(days, None)
    hours = [each * planned.candidate.world / 3600 for each in (low, likely, high)]
    return Bill(days, (hours[0] * price.low, hours[1] * price.likely, hours[2] * price.high))


def layout_words(candidate: Candidate) -> str:
    """Returns a layout in few words, e.g. `64 GPUs: shard 8 zero 2, expert 8 deduplicated, selective, micro 1 x 16`."""
    p = candidate.parallel
    words = [f"{name.replace('_', '-')} {size}" for name in ("tensor", "context") if (size := getattr(p, name)) > 1]
    if p.pipeline > 1:
        words.append(f"pipeline {p.pipeline} {p.pipeline_schedule.value}")
    if p.shard > 1:
        words.append(f"shard {p.shard} zero {p.zero}")
    if p.expert > 1:
        words.append(f"expert {p.expert} {p.exchange.value}")
    if p.expert_tensor > 1:
        words.append(f"expert-tensor {p.expert_tensor}")
    if p.recompute.value != "none":
        words.append(p.recompute.value)
    return ", ".join([*words, f"micro {candidate.micro} x {candidate.micros}"])


def lines(found: Found, run: PlannedRun, seconds: float, cluster: str, title: str) -> list[str]:
    """Returns the table of the best layouts and what the refused ones lack; at most 120 columns."""
    best = found.best
    head = f"{title} on {cluster}: {found.layouts:,} layouts timed, memory of {found.measured:,}, in {seconds:.1f} s"
    if not best:
        return [head, "no layout fits", "", *_refused_lines(found.refused)]
    rows = [row for place, each in enumerate(best, 1) for row in _row(place, each)]
    return [head, "", COLUMNS, f"{'':8}{NUMBERS}", *rows, "", _bill_line(best[0], run), *_refused_lines(found.refused)]


def _row(place: int, planned: RankedLayout) -> list[str]:
    """Two lines: the layout, and what is predicted of it."""
    p, time, candidate = planned.candidate.parallel, planned.time, planned.candidate
    degrees = "".join(f"{'-' if name == 'zero' and p.shard == 1 else getattr(p, name):>8}" for name in DEGREES)
    stages = f"{p.pipeline} {p.pipeline_schedule.value}" if p.pipeline > 1 else "1"
    exchange = p.exchange.value if p.expert > 1 else "-"
    micro = f"{candidate.micro} x {candidate.micros}"
    span = f"{time.low:.2f} to {time.high:.2f}"
    numbers = f"{time.likely:>9.2f}{span:>16}{time.mfu:>7.1%}{time.tokens_per_second_per_gpu:>14,.0f}"
    return [
        f"{place:>2}{candidate.world:>6}{degrees} {stages:15}{exchange:13}{p.recompute.value:10}{micro:>8}",
        f"{'':8}{numbers}{planned.memory.peak / 1e9:>8.1f} GB  {planned.verdict.value}",
    ]


def _bill_line(planned: RankedLayout, run: PlannedRun) -> str:
    days, dollars = bill(planned, run)
    text = f"the first: {run.tokens:.3g} tokens in {days[1]:,.1f} days ({days[0]:,.1f} to {days[2]:,.1f})"
    if dollars is None or run.gpu.price is None:
        return f"{text}; no price of {run.gpu.title} is published"
    low, likely, high = (f"{each:,.3g}" if each < 1000 else f"{each:,.0f}" for each in dollars)
    return f"{text}, {likely} US dollars ({low} to {high}; prices of {run.gpu.price.date})"


def _refused_lines(refused: list[Refused]) -> list[str]:
    if not refused:
        return ["", "no faster layout was refused"]
    rows = ["", "better if they fit", f"   {'kind':40}{'layouts':>8}{'best s':>8}{'least':>10}{'over':>9}  fits with"]
    for each in refused[:PLACES]:
        least = each.least.memory.peak
        over = (least - each.least.usable) / 1e9
        row = f"   {each.kind:40}{each.layouts:>8,}{each.fastest:>8.2f}{least / 1e9:>7.1f} GB{over:>6.1f} GB  {each.remedy}"
        rows.append(row)
    more = len(refused) - PLACES
    return [*rows, f"   and {sum(each.layouts for each in refused[PLACES:]):,} layouts of {more} more kinds"] if more > 0 else rows


# One layout broken down.


def explained(planned: RankedLayout, counts: Workload, run: PlannedRun) -> list[str]:
    """Returns time by term, bytes by link, memory by what it is for, and days and money."""
    time, memory = planned.time, planned.memory
    names = [field.name for field in fields(Terms)]
    shown = [(name, getattr(time.terms, name)) for name in names if getattr(time.terms, name) >= 5e-4]
    rows = [layout_words(planned.candidate), "", f"step {time.likely:.2f} s ({time.low:.2f} to {time.high:.2f})"]
    for name, took in sorted(shown, key=lambda item: -item[1]):
        hides = time.hidden.get(name, 0.0)
        behind = f", of which {hides:.3f} s hide behind {time.behind[name]}" if hides >= 5e-4 else ""
        rows.append(f"  {name.replace('_', ' '):20}{took:>9.3f} s{took / time.likely:>8.1%}{behind}")
    rows += ["", f"bytes a GPU sends: {'in a domain':>22}{'network':>14}"]
    for name in LINKS:
        traffic, times = getattr(counts, name), 1 if name in ("gathers", "gradients") else counts.micro_batches
        if traffic.inside or traffic.network:
            rows.append(f"  {name:20}{times * traffic.inside / 1e9:>16.2f} GB{times * traffic.network / 1e9:>11.2f} GB  a step")
    place = f", rank {memory.rank} of the pipeline" if planned.candidate.parallel.pipeline > 1 else ""
    rows += ["", f"memory {memory.peak / 1e9:.2f} of {planned.usable / 1e9:.1f} GB: {planned.verdict.value}{place}"]
    parts = sorted(memory.parts.items(), key=lambda item: -item[1])
    rows += [f"  {name:26}{size / 1e9:>8.2f} GB" for name, size in parts if size >= 5e6]
    flops = f"{time.flops_per_second_per_gpu / 1e12:,.0f} TFLOP/s and {time.tokens_per_second_per_gpu:,.0f} tokens/s a GPU"
    rows += ["", f"MFU {time.mfu:.1%}, {flops}", _bill_line(planned, run).replace("the first: ", "")]
    price = run.gpu.price
    return [*rows, f"prices of {price.date}: {price.source}"] if price is not None else rows


def as_json(found: Found, run: PlannedRun, seconds: float) -> dict[str, Any]:
    """Returns one object. Bytes and seconds."""
    return {
        "seconds": seconds,
        "layouts": found.layouts,
        "measured": found.measured,
        "best": [layout_json(each, run) for each in found.best],
        "refused": [
            {
                "kind": each.kind,
                "layouts": each.layouts,
                "fastest_seconds": each.fastest,
                "least_bytes": each.least.memory.peak,
                "over_bytes": each.least.memory.peak - each.least.usable,
                "fits_with": each.remedy,
            }
            for each in found.refused
        ],
    }


def layout_json(planned: RankedLayout, run: PlannedRun) -> dict[str, Any]:
    """Returns one layout with time, memory and money."""
    time, candidate, (days, dollars) = planned.time, planned.candidate, bill(planned, run)
    return {
        "ranks": candidate.world,
        "overrides": candidate.overrides(),
        "step_seconds": [time.low, time.likely, time.high],
        "terms": asdict(time.terms),
        "hidden": dict(time.hidden),
        "mfu": time.mfu,
        "tokens_per_second_per_gpu": time.tokens_per_second_per_gpu,
        "memory_bytes": planned.memory.peak,
        "memory": planned.memory.parts,
        "usable_bytes": planned.usable,
        "verdict": planned.verdict.value,
        "days": list(days),
        "dollars": None if dollars is None else list(dollars),
        "price": None if run.gpu.price is None else asdict(run.gpu.price),
    }
