"""The data of the page: one object of plain values for each run. The JavaScript in page/ draws only what it contains."""

import base64
import math
from array import array
from typing import Any

import numpy as np

from ..train.config.config import Config, ConfigError
from ..train.config.model_summary import count, training_flops_per_token
from ..train.config.serialize import config_from_plain, leaves, plain_config
from ..train.logging.trackers.sections import is_index
from .columns import Column, line, rounded
from .headline import broke_off, is_trouble, last_of_end, named, state, verdict
from .run_reader import Run, read_point
from .telemetry_reader import Sums, Telemetry, max_over_mean

# The configuration and the parameters of the model, by part.

PARTS = ("embedding", "attention", "router", "experts", "shared", "dense", "norms", "head", "mtp")


def described(plain: dict[str, Any]) -> dict[str, Any]:
    """`settings`: rows of key, value, default (None for an unknown key) and whether they differ; `parameters`."""
    defaults = dict(leaves(plain_config(Config())))
    rows = [
        {"key": key, "value": text(value), "default": text(defaults[key]) if key in defaults else None}
        for key, value in leaves(plain)
    ]
    for row in rows:
        row["changed"] = row["value"] != row["default"]
    return {"settings": rows, "parameters": parameters(plain)}


def text(value: Any) -> str:
    """Returns `value` as in YAML."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def parameters(plain: dict[str, Any]) -> dict[str, Any] | None:
    """Parameters in total, active, and by part; None for a configuration that this version cannot read."""
    if not isinstance(plain.get("model"), dict):
        return None
    try:
        found = count(config_from_plain({"model": plain["model"]}).model)
    except (ConfigError, ArithmeticError, LookupError, TypeError):
        return None
    parts = {part: [getattr(found, part), found.active_experts if part == "experts" else getattr(found, part)] for part in PARTS}
    return {"total": found.total, "active": found.active, "parts": {part: both for part, both in parts.items() if both[0]}}


MAIN = ("loss", "validation_loss", "lr", "grad_norm", "tokens_per_second", "mfu", "step_seconds")
"""Metrics that are drawn with more points than the others."""
POINTS, FEWER, ALL_POINTS = 1000, 400, 20_000
"""Points of each main metric; most points of each other metric; points of all other metrics together."""
MOST_EVENTS = 2000
MOST_SAMPLES, SAMPLE_CHARACTERS = 50, 4000
FULL_RUNS = 4
"""With more runs than these, each has fewer points."""


def payload(runs: list[Run], live: bool = False, without_run: int = 0) -> dict[str, Any]:
    """Returns the data of the page. `without_run`: points of sweeps of which there is nothing to show."""
    return {"live": live, "without_run": without_run, "runs": [about(run, -(-len(runs) // FULL_RUNS)) for run in runs]}


def about(run: Run, thinner: int = 1) -> dict[str, Any]:
    """Returns the data of one run. `thinner`: divides the points of its series."""
    point = read_point(run.folder)
    return {
        "name": run.name,
        "folder": str(run.folder),
        "state": state(run),
        "steps": run.last_step(),
        "planned": run.config["steps"] if isinstance(run.config.get("steps"), int) else None,
        "tokens": run.metrics.last("tokens"),
        "verdict": [finding._asdict() for finding in verdict(run)],
        "remarks": run.remarks(),
        "facts": facts(run),
        "failed": broke_off(run, point["code"] if point else None),
        "swept": point["differs"] if point else None,
        "series": drawn(run, thinner),
        "axes": axes(run, thinner),
        "samples": samples(run),
        "events": [shown_event(event) for event in run.events[-MOST_EVENTS:]],
        "accounting": accounting(run),
        "environment": environment(run),
        "telemetry": routing(run.telemetry) if run.telemetry.frames else None,
        **described(run.config),
    }


def axes(run: Run, thinner: int) -> dict[str, Any]:
    """Returns what else than steps can be the horizontal axis: its values at steps, between which it is linear.

    Hours are those of training, without validation, checkpoints and the time between starts.
    """
    found, seconds, tokens = {}, run.metrics.by_name.get("step_seconds"), run.metrics.by_name.get("tokens")
    if tokens is not None:
        found["tokens"] = line(tokens, POINTS // thinner)
        model, length = run.config.get("model"), run.config.get("sequence_length", Config().sequence_length)
        try:
            each = (
                training_flops_per_token(config_from_plain({"model": model}).model, int(length)) if isinstance(model, dict) else 0
            )
        except (ConfigError, ArithmeticError, LookupError, TypeError, ValueError):
            each = 0
        if each:
            found["flops"] = found["tokens"] | {"y": rounded(np.array(found["tokens"]["y"]) * each)}
    if seconds is not None:
        hours = np.cumsum(np.nan_to_num(np.asarray(seconds.values), nan=0.0, posinf=0.0, neginf=0.0)) / 3600
        found["hours"] = line(Column(seconds.steps, array("d", hours)), POINTS // thinner)
    return {name: {key: axis[key] for key in ("x", "y")} for name, axis in found.items()}


def samples(run: Run) -> list[dict[str, Any]]:
    """Returns what the model wrote, the newest last."""
    found = [event for event in run.events if event.get("event") == "sample"][-MOST_SAMPLES:]
    return [
        {"step": event.get("step"), **{key: str(event.get(key, ""))[:SAMPLE_CHARACTERS] for key in ("prompt", "text")}}
        for event in found
    ]


def drawn(run: Run, thinner: int = 1) -> dict[str, Any]:
    """Returns the series, without the indices of layers and ranks, which are no curves.

    Metrics of single layers are left out if the telemetry shows them as a heat map.
    """
    columns = {name: column for name, column in run.metrics.by_name.items() if name != "step" and not is_index(name)}
    if run.telemetry.frames:
        columns = {name: column for name, column in columns.items() if "/layer_" not in name}
    fewer = max(60, min(FEWER, ALL_POINTS // max(1, len(columns))) // thinner)
    return {name: line(column, POINTS // thinner if name in MAIN else fewer) for name, column in columns.items()}


def facts(run: Run) -> dict[str, float | None]:
    """Returns the numbers at the top of the page."""
    typical = run.metrics.typical
    return {
        "loss": run.metrics.last("loss"),
        "validation_loss": last_of_end(run, "validation_loss"),
        "tokens_per_second": typical("tokens_per_second"),
        "mfu": typical("mfu"),
        "step_seconds": typical("step_seconds"),
        "bits_per_byte": last_of_end(run, "validation/bits_per_byte"),
        "load": typical("moe/load_max_over_mean"),
        "memory_gb": run.metrics.last("system/memory_peak_gb"),
        "memory_share": run.metrics.last("system/memory_share"),
    }


def shown_event(event: dict[str, Any]) -> dict[str, Any]:
    """Returns the step (if any), kind and remaining fields of an event."""
    left_out = ("event", "step", "time", "alert", "environment", *(("prompt", "text") if event.get("event") == "sample" else ()))
    rest = {key: value for key, value in event.items() if key not in left_out}
    step = event.get("step")
    return {
        "kind": named(event),
        "step": step if isinstance(step, int) else None,
        "time": str(event.get("time", "")),
        "trouble": is_trouble(event),
        "text": "; ".join(f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in rest.items()),
    }


def accounting(run: Run) -> dict[str, Any] | None:
    """Returns the time accounting of the last `accounting` event."""
    found = [event for event in run.events if event.get("event") == "accounting" and isinstance(event.get("seconds"), dict)]
    if not found:
        return None
    seconds = {str(part): value for part, value in found[-1]["seconds"].items() if is_amount(value)}
    productive = found[-1].get("productive")
    return {"seconds": seconds, "productive": productive if is_amount(productive) else None}


def is_amount(value: Any) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


NOT_SHOWN = ("event", "time", "step", "seconds", "path", "environment")


def environment(run: Run) -> list[tuple[str, str]]:
    """Ranks and machine of the newest start, and when the run began and ended, as rows."""
    starts = [event for event in run.events if event.get("event") in ("start", "resume")]
    rows = [("first start", str(starts[0].get("time"))), ("starts", str(len(starts)))] if starts else []
    rows += [("last event", str(run.events[-1].get("time")))] if run.events else []
    newest = starts[-1] if starts else {}
    facts_of_start = newest.get("environment")
    rows += [(str(name), str(value)) for name, value in facts_of_start.items()] if isinstance(facts_of_start, dict) else []
    return rows + [(key, str(value)) for key, value in newest.items() if key not in NOT_SHOWN]


def routing(telemetry: Telemetry) -> dict[str, Any]:
    """Tables by layer and expert. With several frames, the last table of `load` covers the recent records."""
    window, several = telemetry.window(), len(telemetry.frames) > 1
    assert window is not None
    shown = [*telemetry.frames, window] if several else telemetry.frames
    busiest_L = window.counts_LE.argmax(axis=-1).tolist()
    kinds = {kind: tables for kind in ("classes", "sources") if (tables := telemetry.of_kind(kind))}
    return {
        "layers": telemetry.layers,
        "experts": telemetry.experts,
        "frames": [[frame.first, frame.last] for frame in telemetry.frames],
        "recent": [window.first, window.last] if several else None,
        "balance": list(zip(busiest_L, max_over_mean(window.counts_LE).tolist(), strict=True)),
        "load": quantize_ratios(np.stack([shares(frame.counts_LE) for frame in shown]), telemetry.experts),
        "by_layer": by_layer(telemetry.frames),
        "kinds": {
            kind: {"names": list(tables), "counts": np.stack(list(tables.values()), axis=-1).tolist()}
            for kind, tables in kinds.items()
        },
        **latest(telemetry),
    }


def shares(counts: np.ndarray) -> np.ndarray:
    """Returns each number over the mean of its row (the last dimension); NaN in a row of zeros."""
    mean = counts.mean(axis=-1, keepdims=True)
    return np.divide(counts, mean, out=np.full(counts.shape, np.nan), where=mean > 0)


def by_layer(frames: list[Sums]) -> dict[str, Any]:
    """For each metric with one value per layer: rows of layers, columns of frames."""
    names = sorted({name for frame in frames for name in frame.layers})
    nothing = np.zeros(len(frames[0].counts_LE) + 1)
    columns = {name: [frame.layers.get(name, nothing) for frame in frames] for name in names}
    with np.errstate(divide="ignore", invalid="ignore"):
        tables = {name: np.stack([row[:-1] / row[-1] for row in rows], axis=1) for name, rows in columns.items()}
        routed = np.stack([frame.counts_LE.sum(axis=1) for frame in frames], axis=1)
        tables["dropped_L"] = np.stack([frame.dropped_L for frame in frames], axis=1) / routed
    return {name: [rounded(row, 4) for row in table] for name, table in tables.items()}


def latest(telemetry: Telemetry) -> dict[str, Any]:
    """Returns the tables of which only the latest is shown."""
    found: dict[str, Any] = {}
    for name in ("bias_LE", "grad_norm_LE"):
        if name in telemetry.latest:
            table = telemetry.latest[name]
            found[name] = quantize_amounts(table, *((-widest(table), widest(table)) if name == "bias_LE" else (0.0, None)))
    together, alike = telemetry.latest.get("coactivation", {}), telemetry.latest.get("similarity", {})
    found["coactivation"] = {layer: quantize_ratios(partners(table), telemetry.experts) for layer, table in together.items()}
    found["similarity"] = {layer: quantize_amounts(table, -1.0, 1.0) for layer, table in alike.items()}
    words = telemetry.latest.get("vocabulary", {})
    each = max(3, min(10, MOST_WORDS // max(1, sum(len(experts) for experts in words.values()))))
    found["vocabulary"] = {layer: [tokens[:each] for tokens in experts] for layer, experts in words.items()}
    return found


MOST_WORDS = 4000
"""Tokens on a page, divided evenly between the experts."""


def widest(table: np.ndarray) -> float:
    """Returns the largest finite absolute value; 1 if there is none."""
    finite = np.abs(table[np.isfinite(table)])
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def partners(table_EE: Any) -> np.ndarray:
    """Row i: how often each other expert is chosen together with expert i, over an even share; NaN for itself."""
    counts = np.array(table_EE, dtype=float)
    np.fill_diagonal(counts, 0.0)
    total = counts.sum(axis=1, keepdims=True)
    ratio = np.divide(counts * (len(counts) - 1), total, out=np.full(counts.shape, np.nan), where=total > 0)
    np.fill_diagonal(ratio, np.nan)
    return ratio


# Tables quantized to one byte per number, since a heat map shows at most 256 colours.

STEPS = 253
"""Codes 1 to 254 are values from lowest to highest; 0 is exactly zero (an expert without a token), 255 is unknown."""
LOWEST_RATIO = 1 / 32


def quantize_ratios(values: np.ndarray, highest: float) -> dict[str, Any]:
    """Quantizes multiples of an even share on a logarithmic scale from 1/32 to `highest`; 0 has a code of its own."""
    low, high = np.log2(LOWEST_RATIO), np.log2(max(highest, 4.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        place = (np.log2(values) - low) / (high - low)
    return _coded(values, place, values == 0) | {"log": True, "low": float(low), "high": float(high)}


def quantize_amounts(values: np.ndarray, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """Quantizes numbers on a linear scale between their extremes, or between `low` and `high`."""
    finite = values[np.isfinite(values)]
    low = float(finite.min()) if low is None and finite.size else low or 0.0
    high = float(finite.max()) if high is None and finite.size else high or 0.0
    place = (values - low) / (high - low if high > low else 1.0)
    return _coded(values, place, np.zeros(values.shape, dtype=bool)) | {"log": False, "low": low, "high": high}


def _coded(values: np.ndarray, place: np.ndarray, none: np.ndarray) -> dict[str, Any]:
    known = np.isfinite(values)
    codes = 1 + np.rint(np.clip(np.where(known & ~none, place, 0.0), 0.0, 1.0) * STEPS)
    bytes_ = np.where(known, np.where(none, 0, codes), 255).astype(np.uint8).tobytes()
    return {"shape": list(values.shape), "codes": base64.b64encode(bytes_).decode()}
