"""The sentences at the top of the page: balance of the routers, worst layer, dead experts, drops, losses, failures."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from .run_reader import Run
from .telemetry_reader import Sums, max_over_mean

EVEN, UNEVEN = 1.5, 3.0
"""Load of the busiest expert over the mean: up to EVEN is balanced, above UNEVEN is badly unbalanced."""
DROPPED = 0.01
"""A share of dropped choices above this is a warning."""
FULL = 0.95
"""A share of a device's memory above this is a warning."""
RECENT_STEPS = 100
"""Steps that count without telemetry."""
MOVES = 1.2
"""If single steps are this much less even than their sum, other experts are overloaded in other steps."""
TROUBLE = {"failed", "alert", "nan", "spike", "stall", "collapse", "hang", "straggler", "skipped", "rolled_back", "silent"}
ENDS = {"finished": "finished", "failed": "failed", "stopped": "stopped"}


class Remark(NamedTuple):
    """A sentence and its level: `good`, `watch`, `bad` or `fact`."""

    level: str
    text: str


def state(run: Run) -> str:
    """finished, failed or stopped; `no end recorded` for a run that continues or was killed."""
    ends = [event["event"] for event in run.events if event.get("event") in {*ENDS, "start", "resume"}]
    return ENDS.get(ends[-1], "no end recorded") if ends else "no end recorded"


def broke_off(run: Run, code: int | None = None) -> bool:
    """Whether it failed, ended early with an exit code other than 0 (not so at a request to stop), or, by the exit code `code` of a
    point of a sweep, was killed."""
    ends = [event for event in run.events if event.get("event") in {*ENDS, "start", "resume"}]
    if not ends or ends[-1]["event"] in ("start", "resume"):
        return bool(code)
    return ends[-1]["event"] == "failed" or (ends[-1]["event"] == "stopped" and ends[-1].get("code", 0) != 0)


def verdict(run: Run) -> list[Remark]:
    """Returns the remarks, the most important first."""
    window = run.telemetry.window()
    balance = _balance(run, window) if window is not None else _balance_of_metrics(run)
    return [*balance, *_losses(run), *_memory(run), *_plan(run), *_trouble(run)]


def _balance(run: Run, window: Sums) -> list[Remark]:
    """From the recent records of telemetry: the worst layer and its busiest expert, dead experts, drops."""
    load_L = max_over_mean(window.counts_LE)
    row = int(np.argmax(load_L))
    layer, expert, load = run.telemetry.layers[row], int(np.argmax(window.counts_LE[row])), float(load_L[row])
    since = f"in steps {window.first:,} to {window.last:,}" if window.first < window.last else f"at step {window.last:,}"
    words = f"Layer {layer} is the least balanced: expert {expert} gets {load:.2f} x an even share"
    steps = _single_steps(run, window.first, window.last)
    alone = "" if steps is None else _in_words(steps, load)
    level = _level(max(load, steps.middle if steps else 0.0))
    findings = [Remark(level, f"{words} (mean of all layers {load_L.mean():.2f} x) {since}{alone}.")]
    return [*findings, _dead(run, window, since), _dropped(float(window.dropped_L.sum() / max(1, window.counts_LE.sum())), since)]


class SingleSteps(NamedTuple):
    """Load of the busiest expert of the worst layer in single steps, over an even share."""

    middle: float
    """The median of the steps."""
    most: float
    at: int
    """The step of the most."""


def _single_steps(run: Run, first: int, last: int) -> SingleSteps | None:
    """Returns the load in the logged steps of records of telemetry, which are sums over the steps up to each."""
    column = run.metrics.by_name.get("moe/load_max_over_mean")
    every = run.config.get("telemetry", {}).get("every", 1) if isinstance(run.config.get("telemetry"), dict) else 1
    begin = first - (every if isinstance(every, int) else 1)
    known = [] if column is None else zip(column.steps, column.values, strict=True)
    found = [(value, int(step)) for step, value in known if begin < step <= last and np.isfinite(value)]
    if not found:
        return None
    most, at = max(found)
    return SingleSteps(float(np.median([value for value, _ in found])), most, at)


def _in_words(steps: SingleSteps, load: float) -> str:
    moves = steps.middle > MOVES * load and steps.middle > EVEN
    cause = ": the overload moves between experts or layers" if moves else ""
    often = f"; in single steps the busiest expert gets {steps.middle:.2f} x (median)"
    return f"{often}, at most {steps.most:.2f} x at step {steps.at:,}{cause}"


def _memory(run: Run) -> list[Remark]:
    """The rank with the most memory, beside what its device has."""
    peak, mean, rank, share, retries = (
        run.metrics.last(f"system/{key}")
        for key in ("memory_peak_gb", "memory_peak_gb_mean", "memory_peak_gb_rank", "memory_share", "allocation_retries")
    )
    if peak is None or share is None:
        return []
    text = f"Memory: at most {peak:.3g} GB on rank {rank or 0:.0f} (mean of all ranks {mean or peak:.3g} GB)"
    text += f"; {share:.0%} of a device is taken"
    if retries:
        text += f", and {retries:.0f} times the allocator had to free its cache"
    return [Remark("watch" if share > FULL or retries else "fact", f"{text}.")]


def _dead(run: Run, window: Sums, since: str) -> Remark:
    """Returns the experts that the run reports as dead, by its own window; else those without a token in the recent records."""
    reported = run.telemetry.latest.get("dead_LE")
    dead = np.argwhere(reported > 0 if reported is not None else window.counts_LE == 0)
    if reported is not None:
        since = f"for {run.config.get('telemetry', {}).get('window', 'many')} steps, at step {window.last:,}"
    if len(dead):
        row, expert = dead[0].tolist()
        first = f"the first is expert {expert} of layer {run.telemetry.layers[row]}"
        experts = f"{len(dead)} of {window.counts_LE.size:,} experts got"
        return Remark("bad", f"Dead: {experts} no token {since}; {first}.")
    return Remark("good", f"No dead experts {since}.")


def _balance_of_metrics(run: Run) -> list[Remark]:
    """Returns the same from metrics.jsonl alone."""
    load, layer = run.metrics.last("moe/load_max_over_mean"), run.metrics.last("moe/load_max_over_mean_layer")
    if load is None or layer is None:
        return [Remark("fact", "No experts: a dense model, or nothing logged yet.")]
    step = f"at step {run.last_step()}"
    steps = _single_steps(run, max(1, run.last_step() - RECENT_STEPS), run.last_step())
    level = _level(max(load, steps.middle if steps else 0.0))
    alone = f"; of the last {RECENT_STEPS} steps the median is {steps.middle:.2f} x" if steps else ""
    worst = f"Layer {layer:.0f} is the least balanced {step}: its busiest expert gets {load:.2f} x an even share{alone}."
    findings = [Remark(level, worst)]
    dead = run.metrics.last("moe/dead_experts")
    if dead is not None:
        text = f"Dead: {dead:.0f} experts got no token {step}." if dead else f"No dead experts {step}."
        findings.append(Remark("bad" if dead else "good", text))
    return [*findings, _dropped(run.metrics.last("dropped_fraction") or 0.0, step)]


def _level(load: float) -> str:
    return "good" if load <= EVEN else "watch" if load <= UNEVEN else "bad"


def _dropped(share: float, since: str) -> Remark:
    if not share:
        return Remark("good", f"Nothing dropped {since}.")
    return Remark("watch" if share > DROPPED else "fact", f"{share:.2%} of the choices were dropped {since}.")


def _losses(run: Run) -> list[Remark]:
    loss, validation = run.metrics.last("loss"), last_of_end(run, "validation_loss")
    words = [] if loss is None else [f"training loss {loss:.4f} at step {run.last_step():,}"]
    words += [] if validation is None else [f"validation loss {validation:.4f} at step {_validated(run)}"]
    if not words:
        return [Remark("fact", "No loss logged yet.")]
    text = "; ".join(words)
    return [Remark("fact", f"{text[0].upper()}{text[1:]}.")]


def last_of_end(run: Run, name: str) -> float | None:
    """Returns the last value of a number of validation; the final one is in the event of the end."""
    end = _end(run) or {}
    return end[name] if isinstance(end.get(name), int | float) else run.metrics.last(name)


def _validated(run: Run) -> str:
    """Returns the step of the last validation loss."""
    end, column = _end(run), run.metrics.by_name.get("validation_loss")
    step = end.get("step") if end else column.steps[-1] if column else None
    return f"{step:,.0f}" if isinstance(step, int | float) else "unknown"


def _end(run: Run) -> dict[str, Any] | None:
    ends = [event for event in run.events if isinstance(event.get("validation_loss"), int | float)]
    return ends[-1] if ends else None


def _plan(run: Run) -> list[Remark]:
    """What the layout was planned to need and take, beside what its first steps did; on GPUs alone."""
    found = [event for event in run.events if event.get("event") == "plan_checked"]
    if not found:
        return []
    off, text = found[-1].get("off"), str(found[-1].get("text"))
    off = [str(each) for each in off] if isinstance(off, list) else []
    return [
        Remark("fact" if off else "good", f"{text[:1].upper()}{text[1:]}."),
        *(Remark("watch", f"Plan: {each}.") for each in off),
    ]


def _trouble(run: Run) -> list[Remark]:
    """Failures and alerts among the events."""
    found = [event for event in run.events if is_trouble(event)]
    alerts = {event.get("text") for event in found if "alert" in event}
    found = [event for event in found if "alert" in event or event.get("text") is None or event["text"] not in alerts]
    if not found:
        return []
    kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(map(named, found)).most_common())
    newest = f"the last: {named(found[-1])} at step {found[-1].get('step', 'unknown')}"
    return [Remark("watch", f"Failures and alerts: {kinds}; {newest}.")]


def named(event: dict[str, Any]) -> str:
    """Returns the kind of an event, and of an alert its subject."""
    return f"alert: {event['alert']}" if "alert" in event else str(event.get("event", "unnamed"))


def is_trouble(event: dict[str, Any]) -> bool:
    """Whether the event is a failure or an alert."""
    kind = str(event.get("event", ""))
    return kind in TROUBLE or "error" in event
