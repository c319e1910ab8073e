"""Validation losses of runs as curves, and where they cross."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...train.logging.journal import read_journal


class Curve(NamedTuple):
    """A run's evaluations."""

    tokens: list[int]
    losses: list[float]
    """Nats per token."""
    imbalance: float
    """Of the last evaluation: the busiest expert's tokens over an even share, in the worst layer; 0 for a dense model."""
    dropped: float
    """Share of the choices dropped in training, mean over the logged steps."""


def read_curve(folder: Path) -> Curve:
    """From metrics.jsonl of a run folder."""
    records = read_journal(folder / "metrics.jsonl")
    seen = [record for record in records if "validation_loss" in record]
    dropped = sum(record["dropped_fraction"] for record in records) / len(records)
    imbalance = seen[-1].get("validation/load_max_over_mean", 0.0)
    return Curve([record["tokens"] for record in seen], [record["validation_loss"] for record in seen], imbalance, dropped)


def complete(folder: Path) -> bool:
    """Whether the run of this folder has taken its last step."""
    events = folder / "events.jsonl"
    return events.exists() and any(record["event"] == "finished" for record in read_journal(events))


def crossing(tokens: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """The tokens after which a curve is first at or below `target`, between two points linear in the logarithm of the tokens.

    None if it never is; the first point's tokens if it always is, which is then an upper bound.
    """
    for index, loss in enumerate(losses):
        if loss > target:
            continue
        if index == 0:
            return tokens[0]
        before, after = losses[index - 1], loss
        share = (before - target) / (before - after)
        return math.exp(math.log(tokens[index - 1]) * (1 - share) + math.log(tokens[index]) * share)
    return None


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
